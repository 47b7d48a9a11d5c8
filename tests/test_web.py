"""Lists of http:// URLs: images are read with patience, what a server refuses is a failed row, and nothing leaks."""

import http.server
import threading
from pathlib import Path

import pytest
from conftest import make_discs, make_model

from unet_ray.config import PredictConfig, UserError
from unet_ray.data import storage, web
from unet_ray.data.inputs import iter_images
from unet_ray.inference.predict import predict
from unet_ray.ray_backend.session import LOCAL


@pytest.fixture
def server(tmp_path):
    """Serves a folder. `/busy/…` answers 503 twice, `/cut/…` cuts the first answer, `/get/…` knows no HEAD, `/no/…`
    refuses."""
    asked: dict[str, int] = {}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(tmp_path), **kwargs)

        def do_GET(self):
            kind, _, rest = self.path.lstrip("/").partition("/")
            asked[self.path] = asked.get(self.path, 0) + 1
            if kind in ("busy", "cut", "get", "no"):
                self.path = f"/{rest}"
            if kind == "no" or (kind == "get" and self.command == "HEAD"):
                self.send_error(403)
            elif kind == "busy" and asked[f"/busy/{rest}"] < 3:
                self.send_error(503)
            elif kind == "cut" and asked[f"/cut/{rest}"] < 3:
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"part" if self.command == "GET" else b"")
            elif self.command == "HEAD":
                super().do_HEAD()
            else:
                super().do_GET()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            """Requests are not printed."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_a_list_of_urls_is_segmented_and_refusals_are_rows(server, tmp_path):
    images, _ = make_discs(tmp_path, 4)
    names = [image.name for image in sorted(images.iterdir())]
    places = ["busy/images", "cut/images", "get/images", "images"]
    urls = [f"{server}/{place}/{name}?v=1" for place, name in zip(places, names, strict=True)]
    urls += [f"{server}/no/images/{names[0]}?X-Amz-Signature=SECRET", f"{server}/images/gone.png"]
    (tmp_path / "urls.txt").write_text("\n".join(urls))
    found = list(iter_images(str(tmp_path / "urls.txt")))
    sizes = [image.stat().st_size for image in sorted(images.iterdir())]
    assert [image.size for image in found][3:] == [sizes[3], -1, -1] and found[2].size == sizes[2]
    model = make_model(tmp_path / "model")
    config = PredictConfig(model=str(model), inputs=(str(tmp_path / "urls.txt"),), out=str(tmp_path / "out"))
    summary = predict(config, runtime=LOCAL)
    assert (summary.images, summary.ok, summary.failed) == (6, 4, 2)
    assert "403" in str(summary.failures) and "No such file" in str(summary.failures)
    written = [path for path in Path(config.out).rglob("*") if path.is_file() and ".work" not in path.parts]
    assert len(written) > 5 and not [path for path in written if b"SECRET" in path.read_bytes()]


def test_a_url_is_written_without_what_gives_access():
    assert web.without_secrets("https://u:p@h/a.jpg?id=7&w=1") == "https://h/a.jpg?id=7&w=1"
    for secret in ("X-Amz-Signature", "sig", "access_token", "AWSAccessKeyId", "api_key"):
        assert storage.without_secrets(f"https://h/a.jpg?id=7&{secret}=S") == "https://h/a.jpg"


def test_a_web_server_has_no_folders(server):
    with pytest.raises(UserError, match="from a web server single images are read, nothing else"):
        storage.names_in(server)
