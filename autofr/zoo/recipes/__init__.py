"""The recipes that trained the bundled models, one file per model or shared part."""
