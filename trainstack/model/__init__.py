"""The network, its loss, how it is spread over ranks."""
