"""Image files and tables of decoded images: reading, caching, placement in memory, untrusted pickles."""
