"""Pages made of a diagnosis: one HTML file that opens offline, Markdown, and JSON from which both can be made again."""
