"""A live server, asked over HTTP for completions with their routing: `moetrace record`."""
