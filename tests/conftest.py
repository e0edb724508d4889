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
