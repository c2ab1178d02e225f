"""The report: figures (tables in, figure out, no files), Markdown tables, and the text around
them."""
