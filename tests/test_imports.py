"Each module comes alone, quietly, and with no more than it needs"
import importlib, json, re, subprocess, sys
from pathlib import Path
import pytest
import sparsefast

HERE = Path(sparsefast.__file__).parent
MODULES = sorted('.'.join(p.relative_to(HERE).with_suffix('').parts) for p in HERE.rglob('*.py') if not p.stem.startswith('_'))
NEEDS_FASTAI = {'all', 'callback', 'checkpoint', 'cli.bench', 'cli.datasets', 'cli.models', 'cli.options', 'cli.train', 'core', 'learning_rates', 'see.doctor', 'see.recorder', 'see.summaries'}
NEEDS_EXTRA = {'loops.hf': 'transformers', 'loops.lightning': 'lightning'}
PURE = [m for m in MODULES if m not in NEEDS_FASTAI and m not in NEEDS_EXTRA]                                    # the engine, storage and files among them

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

def test_all_rooms_are_there(): assert NEEDS_FASTAI <= set(MODULES) and {'methods', 'sparsify', 'storage.kernels', 'ship.files'} <= set(PURE)

SERVER = '''
import json, os, sys, tempfile, torch
for line in sys.stdin:
    with tempfile.TemporaryFile() as out:
        if not (pid := os.fork()):
            for fd in (1, 2): os.dup2(out.fileno(), fd)
            exec(json.loads(line), {'__name__': 'alone', 'sys': sys})
            sys.exit()
        status = os.waitpid(pid, 0)[1]
        out.seek(0)
        print(json.dumps([status, out.read().decode()]), flush=True)
'''
@pytest.fixture(scope='module')
def alone():
    "Runs code in a process that has PyTorch and nothing of this package: a copy of one that waits, as PyTorch takes seconds to import"
    command = [sys.executable, '-W', 'ignore', '-c', f'import sys; sys.path.insert(0, {str(HERE.parent)!r})\n{SERVER}']
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        def run(code):
            print(json.dumps(code), file=p.stdin, flush=True)
            return json.loads(p.stdout.readline())
        yield run
        p.stdin.close()

@pytest.mark.parametrize('module', MODULES)
def test_imports_alone_and_prints_nothing(module, alone):
    "The rooms of pure PyTorch with fastai and torchvision out of reach"
    if module in NEEDS_EXTRA: pytest.importorskip(NEEDS_EXTRA[module])
    code = f'assert not any(m.startswith("sparsefast") for m in sys.modules)\nimport sparsefast.{module}; assert "fastai.vision.all" not in sys.modules'
    assert alone((BLOCK if module in PURE else '')+code)==[0, '']

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
    assert not re.search(r'fastai\.vision\.all', (HERE/f'{module.replace(".", "/")}.py').read_text())

def test_core_brings_in_little():
    "Beside fastai.basics no package but torch, fastai, safetensors and this one: `import sparsefast.core` is to cost next to nothing more"
    done = python("""import fastai.basics; before = set(sys.modules)
import sparsefast.core
print(*sorted({m.split('.')[0] for m in set(sys.modules)-before}-set(sys.stdlib_module_names)))""")
    assert done.returncode==0 and set(done.stdout.split())<={'sparsefast','fastai','torch','safetensors'}, done.stdout+done.stderr

MAY_IMPORT = {
    'masks': 'ops pieces',
    'pieces': '',
    'memory': 'optim pieces',
    'ops': '',
    'topk': 'masks pieces',
    'optim': '',
    'resets': 'masks optim',
    'patterns': 'masks topk',
    'groups': 'patterns',
    'select': 'masks',
    'distributions': 'masks pieces topk',
    'scores': 'optim',
    'draws': 'scores',
    'tokens': 'select',
    'topology': 'draws scores',
    'saliency': 'masks select topk',
    'calibration': 'select',
    'importance': 'calibration masks patterns scores',
    'one_shot': 'calibration distributions guard importance patterns select sparsify targets',
    'schedules': '',
    'allocation': 'topk',
    'ranks': 'masks memory pieces',
    'training_time': '',
    'layer': 'masks memory optim resets scores tokens',
    'sharded': 'layer optim pieces scores',
    'loading': 'copies masks',
    'find': 'layer loading masks pieces ranks sharded',
    'copies': 'masks',
    'noted': 'findings masks ranks',
    'findings': '',
    'guard': 'copies loading masks noted ops pieces ranks',
    'exploration': 'layer masks optim resets topk',
    'exchange': 'masks patterns scores select topk',
    'amounts': 'exchange masks patterns',
    'plan': 'amounts exchange ranks',
    'rewire': 'find layer masks memory optim pieces plan',
    'checks': 'findings masks noted optim patterns plan',
    'settings': '',
    'serialize': 'method',
    'method': 'patterns resets schedules scores settings training_time',
    'gradients': 'layer',
    'methods': 'checks exploration find gradients guard layer memory method optim plan rewire serialize training_time',
    'naming': 'method settings',
    'presets': 'allocation draws methods naming patterns schedules scores topology',
    'targets': 'distributions masks ranks select',
    'cautions': 'findings masks select',
    'sparsify': 'cautions distributions guard loading masks memory noted patterns pieces ranks scores select targets',
    'attach': 'optim presets training_time',
    'average': 'copies guard masks sparsify',
    'learning_rates': 'callback find optim training_time',
    'callback': 'masks methods optim presets ranks scores sparsify training_time',
    'checkpoint': 'sparsify storage',
    'cli.bench': 'cli.commands cli.console cli.models cli.options masks ship.deploy ship.files ship.shrink sparsify storage',
    'cli.commands': 'cli.console',
    'cli.console': '',
    'cli.datasets': '',
    'cli.models': 'cli.console',
    'cli.options': 'cli.console cli.datasets cli.models distributions presets',
    'cli.outcome': 'masks see.analysis ship.deploy ship.files ship.timing storage',
    'cli.train': 'callback cli.commands cli.console cli.datasets cli.models cli.options cli.outcome masks presets scores ship.files sparsify storage',
    'loops.base': 'attach find masks methods optim ranks sparsify',
    'loops.hf': 'find guard loops.base methods noted presets serialize ship.files sparsify',
    'loops.lightning': 'loops.base presets sparsify',
    'see.analysis': 'find layer masks pieces see.flops select storage',
    'see.doctor': 'callback checks copies guard masks methods optim pieces see.mask_checks',
    'see.figures': '',
    'see.flops': 'draws masks storage',
    'see.mask_checks': 'checks layer masks patterns ranks see.analysis select storage',
    'see.plots': 'see.analysis see.figures storage',
    'see.recorder': 'callback find masks see.analysis see.flops',
    'see.summaries': 'find see.analysis see.recorder',
    'ship.chains': '',
    'ship.codes': '',
    'ship.deploy': 'masks pieces ship.fold ship.forms ship.graph ship.timing sparsify storage.convert storage.kernels',
    'ship.export': 'pieces ship.deploy sparsify',
    'ship.files': 'masks memory pieces ship.codes ship.optim_state sparsify storage storage.kernels',
    'ship.fold': 'masks ship.graph',
    'ship.forms': 'masks patterns storage',
    'ship.graph': 'masks',
    'ship.hub': 'methods presets see.analysis ship.files',
    'ship.lora': 'masks',
    'ship.optim_state': 'masks optim storage',
    'ship.channels': 'allocation find masks optim ship.chains ship.shrink',
    'ship.shrink': 'masks memory optim pieces ship.chains',
    'ship.timing': '',
    'storage.base': 'guard masks memory storage.kernels tokens',
    'storage.conv': 'storage.base storage.kernels storage.planes tokens',
    'storage.convert': 'guard memory optim pieces storage.base storage.conv storage.linear',
    'storage.kernels': 'masks ops',
    'storage.linear': 'storage.base storage.kernels tokens',
    'storage.planes': 'ops storage.kernels',
    'storage.update': 'draws layer masks memory optim resets scores storage.base storage.kernels tokens',
}
def imported(module):
    "Rooms that a module imports from, by their dotted names"
    for dots,name in re.findall(r'^from (\.+)([\w.]+) import', (HERE/f'{module.replace(".", "/")}.py').read_text(), re.M):
        yield name if len(dots)>module.count('.') else f'{module.rpartition(".")[0]}.{name}'

@pytest.mark.parametrize('module,may', MAY_IMPORT.items(), ids=MAY_IMPORT)
def test_arrows_run_one_way(module, may):
    rooms = set(imported(module))-{'utils'}                                              # which every room may use
    assert rooms <= set(may.split()) and (rooms or not may)

# ------------------------------------------------------------ import paths of before the wings
OLD = dict(sparse_ops='storage.kernels', layers='storage', flops='see.flops', analysis='see.analysis', recorder='see.recorder', plots='see.plots', doctor='see.doctor',
           files='ship.files', shrink='ship.shrink', deploy='ship.deploy', export='ship.export', console='cli.console', datasets='cli.datasets', models='cli.models', bench='cli.bench')
@pytest.mark.parametrize('old,new', OLD.items(), ids=OLD)
def test_old_import_paths_work(old, new):
    assert importlib.import_module(f'sparsefast.{old}') is importlib.import_module(f'sparsefast.{new}')

def test_compressed_layers_are_found_by_all_their_paths():
    import sparsefast.storage as storage
    assert importlib.import_module('sparsefast.storage.layers') is storage is importlib.import_module('sparsefast.layers')
    from sparsefast.storage.layers import SparseLinear
    assert SparseLinear is importlib.import_module('sparsefast.storage.linear').SparseLinear
    names = {'min_sparsity','SparseLayer','SparseLinear','index_misfit','SparseConv1d','SparseConv2d','to_sparse_layers','to_masked_layers','as_masked'}
    assert set(storage.__all__)==names and all(hasattr(storage, n) for n in names)

@pytest.mark.parametrize('room,name,now', [('rewire', 'reset_state', 'resets'), ('rewire', 'pattern_of', 'plan'), ('masks', 'top_k_mask', 'topk'), ('layer', 'find_layers', 'find')])
def test_names_are_found_in_their_old_rooms(room, name, now):
    old = importlib.import_module(f'sparsefast.{room}')
    assert getattr(old, name) is getattr(importlib.import_module(f'sparsefast.{now}'), name)
    with pytest.raises(AttributeError, match='no_such_name'): old.no_such_name

def test_old_names_of_the_command_line():
    from sparsefast.cli import sparsefast_train
    from sparsefast.cli.bench import sparsefast_bench
    commands = importlib.import_module('sparsefast.cli.commands')
    assert sparsefast_train is importlib.import_module('sparsefast.cli.train').sparsefast_train is commands.sparsefast_train
    assert sparsefast_bench is commands.sparsefast_bench

def test_the_package_gives_the_names_of_core_and_stays_quick():
    done = python("import sparsefast; assert 'torch' not in sys.modules; from sparsefast import sparsify_model; import sparsefast.core as core; assert sparsify_model is core.sparsify_model")
    assert done.returncode==0, done.stderr
    with pytest.raises(AttributeError, match='no_such_name'): sparsefast.no_such_name

def test_no_name_has_two_meanings():
    "A public name of one room is the same object in every other"
    meanings = {}
    for m in MODULES:
        mod = importlib.import_module(f'sparsefast.{m}')
        for n in getattr(mod, '__all__', []): meanings.setdefault(n, {}).setdefault(id(getattr(mod, n)), []).append(m)
    assert not {n: list(rooms.values()) for n,rooms in meanings.items() if len(rooms)>1}

def test_core_is_what_scripts_need_and_all_is_more():
    import sparsefast.all as everything, sparsefast.core as core
    assert 40<=len(core.__all__)<=50 and set(core.__all__)<set(everything.__all__)
    from sparsefast.core import TopKAST_presets                                          # other names are still found there
    assert TopKAST_presets is everything.TopKAST_presets
    with pytest.raises(AttributeError, match='no_such_name'): core.no_such_name

def test_there_is_no_circle():
    def visit(m, path):
        assert m not in path, ' -> '.join((*path, m))
        for n in MAY_IMPORT.get(m, '').split(): visit(n, (*path, m))
    for m in MAY_IMPORT: visit(m, ())
    assert {m for m in MODULES if m not in ('core', 'all', 'utils')}<=set(MAY_IMPORT)
