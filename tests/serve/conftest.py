import httpx
import pytest

from tests.serve.support import EchoBackend, client, model_info, save_tokenizer, serving


@pytest.fixture(scope="session")
def metadata_dir(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def shared_backend(metadata_dir):
    return EchoBackend(model_info(metadata_dir))


@pytest.fixture(scope="session")
def shared_url(shared_backend):
    with serving(shared_backend) as url:
        yield url


@pytest.fixture
def backend(shared_backend, metadata_dir):
    """One server serves all tests, since starting one takes longer than a test; each test finds its backend new."""
    vars(shared_backend).update(vars(EchoBackend(model_info(metadata_dir))))
    return shared_backend


@pytest.fixture
def url(shared_url, backend):
    return shared_url


@pytest.fixture
def ai(url):
    with client(url) as ai:
        yield ai


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=60) as http:
        yield http
