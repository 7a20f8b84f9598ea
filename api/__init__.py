"""The HTTP gateway, the store and the command line."""
