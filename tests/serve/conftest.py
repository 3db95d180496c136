import httpx
import pytest

from tests.serve.support import EchoBackend, client, model_info, save_tokenizer, serving


@pytest.fixture(scope="session")
def metadata_dir(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def backend(metadata_dir):
    return EchoBackend(model_info(metadata_dir))


@pytest.fixture
def url(backend):
    with serving(backend) as url:
        yield url


@pytest.fixture
def ai(url):
    with client(url) as ai:
        yield ai


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=60) as http:
        yield http
