"""Labeled texts for probing, SCR and TPP: from the Hub, a local folder, or the standard library."""
