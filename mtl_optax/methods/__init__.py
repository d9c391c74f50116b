"""The methods, one per file. The folder of a method says what it reads, and therefore what it costs."""
