"""Static HTML pages: the frame that they share, and charts for pages and papers."""
