"use strict";
// What a chart's title says, in the line below it: by pointer, and by arrow keys on a focused chart.
for (const figure of document.querySelectorAll("figure")) {
  const out = figure.querySelector(".readout");
  if (!out) continue;
  const say = (chart, mark) => {
    for (const on of figure.querySelectorAll(".on")) on.classList.remove("on");
    mark.classList.add("on");
    out.textContent = mark.querySelector("title").textContent;
  };
  for (const chart of figure.querySelectorAll("svg[tabindex]")) {
    const marks = [...chart.querySelectorAll(".mark")];
    let at = -1;
    chart.addEventListener("pointermove", (event) => {
      const mark = event.target.closest(".mark");
      if (mark) { at = marks.indexOf(mark); say(chart, mark); }
    });
    chart.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: marks.length - 1 }[event.key];
      if (to === undefined || !marks.length) return;
      event.preventDefault();
      at = Math.max(0, Math.min(marks.length - 1, to));
      say(chart, marks[at]);
    });
  }
  for (const map of figure.querySelectorAll(".map")) {
    const rows = [...map.parentElement.querySelectorAll("li")].map((row) => [row.title, row.dataset.values.split(" ")]);
    const frame = map.querySelector("i");
    let [x, y] = [1, 0];
    const show = () => {
      const steps = rows[y][1].length, value = rows[y][1][x];
      frame.hidden = false;
      frame.style.cssText = `left:${(100 * x) / steps}%;width:${100 / steps}%;top:${(100 * y) / rows.length}%;height:${100 / rows.length}%`;
      out.textContent = `${rows[y][0]}, step ${x + Number(figure.dataset.first)}: ${value === "-" ? "no step before it" : value + " % change"}`;
    };
    map.addEventListener("pointermove", (event) => {
      const box = map.getBoundingClientRect(), of = (share, count) => Math.max(0, Math.min(count - 1, Math.floor(share * count)));
      y = of((event.clientY - box.top) / box.height, rows.length);
      x = of((event.clientX - box.left) / box.width, rows[y][1].length);
      show();
    });
    map.addEventListener("keydown", (event) => {
      const by = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
      if (!by) return;
      event.preventDefault();
      y = Math.max(0, Math.min(rows.length - 1, y + by[1]));
      x = Math.max(0, Math.min(rows[y][1].length - 1, x + by[0]));
      show();
    });
  }
}
