"""The live page: its files, and the data that it draws."""
