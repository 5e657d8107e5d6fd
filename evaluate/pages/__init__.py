"""Pages that need no server: their common frame, and charts for pages and papers."""
