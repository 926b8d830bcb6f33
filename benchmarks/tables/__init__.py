"""CSVs of results, and the Markdown tables made from them."""
