"One thread, one seed, no state between tests"
import tempfile
import matplotlib, pytest, torch
from hypothesis import configuration, settings

matplotlib.use('Agg')
torch.set_num_threads(1)
configuration.set_hypothesis_home_dir(tempfile.mkdtemp(prefix='hypothesis'))
settings.register_profile('contract', deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile('contract')

def pytest_addoption(parser): parser.addoption('--device', help="where tests make their tensors, models and data, such as `cuda`; by default the CPU")

@pytest.fixture(autouse=True, scope='session')
def device(request):
    if (device := request.config.getoption('--device')): torch.set_default_device(device)
    torch.backends.cudnn.allow_tf32 = False                                               # a GPU's convolutions, to the tolerances of float32
    return torch.get_default_device()

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

@pytest.fixture
def cpu_amp(monkeypatch):
    "Mixed precision with a scaler that works on the CPU, where fastai's switches itself off"
    from fastai.callback import fp16
    monkeypatch.setattr(fp16, 'autocast', lambda _, **kw: torch.amp.autocast('cpu', **kw))
    monkeypatch.setattr(fp16, 'GradScaler', lambda _, **kw: torch.amp.GradScaler('cpu', **kw))
