"One thread, one seed, no state between tests"
import tempfile
import matplotlib, pytest, torch
from hypothesis import configuration, settings

matplotlib.use('Agg')
torch.set_num_threads(1)
configuration.set_hypothesis_home_dir(tempfile.mkdtemp(prefix='hypothesis'))
settings.register_profile('contract', deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile('contract')

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

@pytest.fixture
def cpu_amp(monkeypatch):
    "Mixed precision with a scaler that works on the CPU, where fastai's switches itself off"
    from fastai.callback import fp16
    monkeypatch.setattr(fp16, 'autocast', lambda _, **kw: torch.amp.autocast('cpu', **kw))
    monkeypatch.setattr(fp16, 'GradScaler', lambda _, **kw: torch.amp.GradScaler('cpu', **kw))
