"""Compression: turns a source pipeline and a device profile into a Plan. Import from the modules; nothing runs here."""
