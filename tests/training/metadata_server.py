"""A small metadata server on this machine that answers as Google's does, for tests of notices."""

import http.server
import threading
import time


class Metadata:
    """A metadata server. values: what it says below instance/; asked: the keys that were asked for."""

    def __init__(self, *, flavor="Google"):
        self.values = {"maintenance-event": "NONE", "preempted": "FALSE"}
        self.asked: list[str] = []
        self.broken = False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                key = self.path.removeprefix("/computeMetadata/v1/instance/")
                outer.asked.append(key)
                known = self.headers.get("Metadata-Flavor") == "Google" and key in outer.values and not outer.broken
                self.send_response(200 if known else 503)
                self.send_header("Metadata-Flavor", flavor)
                self.end_headers()
                self.wfile.write(outer.values[key].encode() if known else b"no")

            def log_message(self, format, *arguments):
                del format, arguments

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def wait(self, looks=1):
        """Until both keys were asked for so many times more."""
        wanted = len(self.asked) + 2 * looks + 1
        _until(lambda: len(self.asked) >= wanted)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def _until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
