"""Pages that need no server: the frame they share, and charts for them and for papers."""
