"""Other libraries' interfaces: `trl`."""
