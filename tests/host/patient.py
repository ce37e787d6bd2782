"""A pytest plugin for the host's own tests: they give a server twenty seconds to start, and
a slow machine needs more."""

import time

import websocket

SECONDS = 240
connect_once = websocket.WebSocket.connect


def connect(self, url, **options):
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return connect_once(self, url, **options)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


websocket.WebSocket.connect = connect
