"""The book's generated pages: each module turns what the repository holds into Markdown."""
