"""A WebSocket server and client.

websocket_echo.py serve PORT
websocket_echo.py call URL    sends lines and a large message, prints what comes back
"""

import sys

from websockets.sync.client import connect
from websockets.sync.server import serve


def echo(socket):
    for message in socket:
        socket.send(message)


if sys.argv[1] == "serve":
    with serve(echo, "127.0.0.1", int(sys.argv[2])) as server:
        server.serve_forever()
else:
    with connect(sys.argv[2], max_size=None) as socket:
        for message in ["one", "two"]:
            socket.send(message)
            print(socket.recv(timeout=10))
        large = b"x" * 900_000
        socket.send(large)
        print(socket.recv(timeout=10) == large)
