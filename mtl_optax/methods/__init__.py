"""Every method in one file; the folders say what a method looks at, and so what it costs."""
