"""The I/O Kit spelling."""
