"""Arrays out of files, loaded once past the page cache, and served to any number of processes."""
