"""On the path of every process the suite starts: connections that leave this machine fail."""
import socket

_connect = socket.socket.connect


def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        host = str(address[0])
        if not (host.startswith("127.") or host in ("::1", "localhost", socket.gethostname())):
            raise PermissionError(f"the test suite opened a connection to {address}")
    return _connect(self, address)


socket.socket.connect = connect
