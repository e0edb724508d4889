"Each module comes alone, quietly, and with no more than it needs"
import re, subprocess, sys
from pathlib import Path
import pytest
import sparsefast

HERE = Path(sparsefast.__file__).parent
MODULES = sorted(p.stem for p in HERE.glob('*.py') if not p.stem.startswith('_'))
PURE = ['masks','patterns','select','distributions','scores','saliency','schedules','allocation','ranks','rewire','methods','presets','attach','flops','analysis','plots','sparse_ops','layers','shrink']

def python(code):
    "In a process of its own, which finds the package where this one found it"
    code = f'import sys; sys.path.insert(0, {str(HERE.parent)!r})\n{code}'
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)

BLOCK = '''
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('fastai','torchvision'): raise ImportError(f'{name} is blocked')
sys.meta_path.insert(0, Block())
'''

def test_all_rooms_are_there(): assert {*PURE,'sparsify','callback','core','cli'} <= set(MODULES)

@pytest.mark.parametrize('module', MODULES)
def test_imports_alone_and_prints_nothing(module):
    "The rooms of pure PyTorch with fastai and torchvision out of reach"
    done = python(f'{BLOCK if module in PURE else ""}import sparsefast.{module}; assert "fastai.vision.all" not in sys.modules')
    assert done.returncode==0, done.stderr
    assert done.stdout=='' and done.stderr==''

@pytest.mark.parametrize('name', ['fastai','torchvision'])
def test_the_block_blocks(name): assert f'{name} is blocked' in python(f'{BLOCK}import {name}.optim').stderr

def test_plain_loop_without_fastai():
    done = python(f'''{BLOCK}
import torch, warnings
from sparsefast.masks import sparse_mask_like, sparse_params
from sparsefast.methods import DSTMethod
from sparsefast.presets import RigL_presets
model = torch.nn.Linear(10, 5)
model.register_buffer('weight_mask', sparse_mask_like(model.weight, .5))
opt,method = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9),DSTMethod(**{{**RigL_presets, 'batches_per_update': 8}})
start = model.weight_mask.clone()
for step in range(1, 33):
    opt.zero_grad()
    model(torch.randn(4,10)).square().mean().backward()
    method.step(model, opt, step, (step-1)/32)
assert model.weight_mask.sum()==25 and not model.weight_mask.equal(start) and (model.weight[~model.weight_mask]==0).all()''')
    assert done.returncode==0, done.stderr

@pytest.mark.parametrize('module', MODULES)
def test_no_module_wants_everything(module):
    assert not re.search(r'fastai\.vision\.all', (HERE/f'{module}.py').read_text())

def test_core_brings_in_little():
    "Beside fastai.basics no package but torch, fastai, safetensors and this one: `import sparsefast.core` is to cost next to nothing more"
    done = python("""import fastai.basics; before = set(sys.modules)
import sparsefast.core
print(*sorted({m.split('.')[0] for m in set(sys.modules)-before}-set(sys.stdlib_module_names)))""")
    assert done.returncode==0 and set(done.stdout.split())<={'sparsefast','fastai','torch','safetensors'}, done.stdout+done.stderr

MAY_IMPORT = dict(masks=[], patterns=['masks'], select=['masks'], distributions=['masks'], scores=[], saliency=['masks','select'], schedules=[], allocation=['masks'],
                  ranks=['masks'], sparsify=['masks','patterns','select','distributions','ranks','scores'], rewire=['masks','patterns','select','ranks','scores'],
                  methods=['masks','patterns','scores','schedules','rewire'], presets=['allocation','patterns','schedules','scores'],
                  callback=['masks','distributions','ranks','rewire','scores','sparsify','methods'], attach=['masks','methods','scores'], checkpoint=['sparsify'], sparse_ops=['masks'],
                  files=['checkpoint','layers','masks','scores','sparse_ops','sparsify'], shrink=['masks'], deploy=['layers','masks','patterns','shrink','sparsify'],
                  export=['checkpoint','deploy','shrink','sparsify'], layers=['masks','scores','sparse_ops'], flops=['masks','layers'], analysis=['flops','layers','masks','rewire','select'], plots=['analysis','layers','rewire','select'],
                  console=[], datasets=['console'], models=['console'], recorder=['analysis','callback','flops','masks','rewire','select'],
                  doctor=['analysis','callback','layers','masks','methods','patterns','rewire','scores','select','sparse_ops','sparsify'])
@pytest.mark.parametrize('module,may', MAY_IMPORT.items(), ids=MAY_IMPORT)
def test_arrows_run_one_way(module, may):
    rooms = re.findall(r'^from (?:sparsefast)?\.(\w+) import', (HERE/f'{module}.py').read_text(), re.M)
    assert set(rooms) <= set(may) and (rooms or not may)
