"The console command: what it prints, saves and refuses"
import gzip, inspect, json, re, runpy, subprocess, sys
from functools import partial
from pathlib import Path
import numpy as np, pytest, sparsefast, torch
from PIL import Image
from fastai.learner import load_learner
from fastprogress import fastprogress
from sparsefast.cli import commands, options, train as cli, datasets, models
from sparsefast.ship.files import load_sparse, masked_state
from sparsefast.storage import SparseLinear, as_masked
from sparsefast.masks import masked_params, sparse_params

ENTRY = "import sys\nfrom sparsefast.cli.commands import train_main\nsys.exit(train_main())\n"
OPTIONS = 'data arch method sparsity dist epochs lr bs every size seed out storage json device pretrained seeds'.split()

@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty current folder"
    (tmp_path/'work').mkdir()
    monkeypatch.chdir(tmp_path/'work')
    return tmp_path/'work'

@pytest.fixture
def command(here, monkeypatch, capsys):
    "Run the command in this process, as its console script does; returns (exit code, stdout, stderr)"
    script = here.parent/'entry.py'
    script.write_text(ENTRY)
    for k in ('NO_BAR', 'WRITER_FN'): monkeypatch.setattr(fastprogress, k, getattr(fastprogress, k))
    monkeypatch.setattr(fastprogress.ConsoleProgressBar, 'fill', fastprogress.ConsoleProgressBar.fill)
    monkeypatch.setattr(cli, 'speeds', partial(cli.speeds, seconds=0))
    def run(args):
        monkeypatch.setattr(sys, 'argv', ['sparsefast_train', *(args.split() if isinstance(args, str) else args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: runpy.run_path(str(script), run_name='__main__')
        return e.value.code or 0, *capsys.readouterr()
    return run

@pytest.fixture
def load():
    "`load_learner`, without its warning about pickle"
    def f(name):
        with pytest.warns(UserWarning, match='pickle'): return load_learner(name)
    return f

def folder(path, classes=('cat', 'dog'), n=10, side=40, start=0):
    "Noisy images, one folder for each class: the first is dark, the next brighter"
    rng = np.random.default_rng(start)
    for i,c in enumerate(classes):
        (path/c).mkdir(parents=True)
        for j in range(n): Image.fromarray(rng.integers(80*i, 80*i+90, (side, side+8, 3), dtype=np.uint8)).save(path/c/f'{start+j}.png')
    return path

def idx(path, a):
    "Write `a` as a gzipped idx file"
    with gzip.open(path, 'wb') as f: f.write(bytes([0, 0, 8, a.ndim]) + b''.join(n.to_bytes(4, 'big') for n in a.shape) + a.astype(np.uint8).tobytes())

def table(out):
    "{layer: (shape, weights, active, sparsity, target)} from what was printed"
    lines = out[out.index('layer '):].split('\n\n')[0].splitlines()
    assert lines[0].split()==['layer', 'shape', 'weights', 'active', 'sparsity', 'target']
    rows = [l.replace(',', '').split() for l in lines[1:]]
    return {r[0]: (r[1] if len(r)==6 else '', int(r[-4]), int(r[-3]), float(r[-2]), float(r[-1])) for r in rows}

def accuracies(out):
    if 'accuracy: ' in out: return [float(w[:-1]) for w in out[out.index('accuracy: '):].splitlines()[0].split() if w.endswith('%')]
    return [float(w[:-1]) for l in out.splitlines() if l.startswith(('sparse (', 'dense  ')) for w in l.split() if w.endswith('%')][::-1]
def last_epochs(out): return [l.split() for l in out.splitlines() if l.strip()[:1].isdigit() and l.strip()[-3:-2]==':']

def check_outcome(out, results, small):
    "The last table has the numbers of the file of results"
    head,dense,sparse,gain = (l.split('  ') for l in out[out.index('\n  ', out.index('total')):].strip('\n').splitlines()[:4])
    cells = [[c.strip() for c in row if c.strip()] for row in (head, dense, sparse, gain)]
    assert cells[0]==['accuracy', 'file, bytes', 'ms, 1 image', 'ms, 128 images', 'training, s']
    runs = json.loads(results.read_text())['runs']
    for run,row in zip(runs, cells[1:]):
        ms = [f'{run["ms"][n]:.3f}' for n in ('1', '128')]
        assert row==[run['name'], f'{run["accuracy"]:.2%}', f'{run["file"]:,}', *ms, f'{run["training"]:.1f}']
    assert runs[1]['file']==small.stat().st_size<runs[0]['file']/5 and runs[0]['ms']!=runs[1]['ms']
    assert cells[3][0]=='gain' and cells[3][2]==f"{runs[0]['file']/runs[1]['file']:.1f}x"

# ------------------------------------------------------------ runs
def test_a_shell_and_a_fresh_process(here):
    (here.parent/'entry.py').write_text(ENTRY)
    p = subprocess.run([sys.executable, here.parent/'entry.py', '--epochs', '2', '--json', 'r.json'], capture_output=True, text=True)
    assert p.returncode==0 and p.stderr==''
    assert 'train_loss' in p.stdout and '█' not in p.stdout and sorted(f.name for f in here.iterdir())==['r.json', 'sparsefast_digits.pkl', 'sparsefast_digits.safetensors']
    rows = table(p.stdout)
    assert [r[0] for r in rows.values()]==['1024x64', '1024x1024', '10x1024', '']
    total = rows.pop('total')
    assert total[1]==sum(r[1] for r in rows.values()) and total[2]==sum(r[2] for r in rows.values()) and total[3]==total[4]==0.95
    assert all(abs(r[3]-(1-r[2]/r[1]))<1e-4 for r in rows.values())                          # (density has moved between layers)
    sparse,dense = accuracies(p.stdout)
    assert sparse>70 and dense>70
    check_outcome(p.stdout, here/'r.json', here/'sparsefast_digits.safetensors')
    load = next(l for l in p.stdout.splitlines() if l.startswith('to load: '))[len('to load: '):]
    use = f'''{load}
from sklearn.datasets import load_digits
from sparsefast.masks import sparse_params
from sparsefast.storage import to_masked_layers
import torch
d = load_digits()
assert sum(learn.predict(d.images[i])[0]==str(d.target[i]) for i in range(50))>=35
assert [type(m).__name__ for m in learn.model.modules()].count('SparseLinear')==1
to_masked_layers(learn)
masks = sparse_params(learn.model)
assert len(masks)==2
with torch.no_grad():
    for p,_,_ in masks: p.fill_(1.)
    learn.model.eval()(torch.zeros(1, 1, 8, 8))
assert all((p[~m]==0).all() and (p[m]==1).all() for p,m,_ in masks)
'''
    q = subprocess.run([sys.executable, '-W', 'ignore', '-c', use], capture_output=True, text=True)
    assert q.returncode==0, q.stderr

def sizes(out): return {l.split()[1].rstrip(','): int(l.split()[2].replace(',', '')) for l in out.splitlines() if l.startswith('saved: ')}

@pytest.mark.parametrize('args, names', [('', ('sparsefast_digits.pkl', 'sparsefast_digits.safetensors')), ('--method dense --out sub/m.pkl', ('sub/m.pkl', 'sub/m.safetensors')), ('--storage sparse --out m', ('m', 'm.safetensors'))])
def test_the_small_file_besides(command, load, here, args, names):
    "Both files are named with their size, and hold the same model"
    (here/'sub').mkdir()
    code,out,err = command(f'--epochs 1 --arch mlp {args}')
    assert (code,err)==(0, '') and sizes(out)=={n: (here/n).stat().st_size for n in names} and 'open only those that you trust' in out
    assert tuple(sizes(out))==names and (sizes(out)[names[1]]<.3*sizes(out)[names[0]] or 'dense' in args)
    whole,small = masked_state(load(names[0])),load_sparse(names[1])
    assert whole.keys()==small.keys() and all(torch.equal(v, small[k]) for k,v in whole.items())

def test_out_may_not_be_the_small_file(command, here):
    code,out,err = command('--out m.safetensors')
    assert code==2 and out=='' and 'out must not end in .safetensors' in err and not list(here.iterdir())
    (here/'m.safetensors').mkdir()
    code,_,err = command('--out m.pkl')
    assert code==2 and "out must be a file, got the folder" in err and 'm.safetensors' in err

def test_nothing_is_pickled_by_value(command, here):
    import zipfile
    assert command('--epochs 1 --arch mlp --bs 256')[0]==0
    with zipfile.ZipFile('sparsefast_digits.pkl') as z: pickled = z.read(next(n for n in z.namelist() if n.endswith('data.pkl')))
    assert b'sparsefast.memory' in pickled and b'_make_function' not in pickled

@pytest.mark.parametrize('method', ['static', 'set', 'snfs', 'rigl', 'rigl_avg', 'gmp', 'granet', 'topkast', 'srigl', 'dsr'])
def test_methods(command, load, method):
    code,out,err = command(f'--arch mlp --method {method} --sparsity 0.9 --epochs 2 --bs 128 --storage masked --out m.pkl')
    assert code==0 and (err=='' or method in ('topkast', 'srigl', 'dsr')) and f'sparse ({method})' in out and abs(table(out)['total'][3]-0.9)<(.01 if method=='srigl' else 1e-9)
    assert ('masks change every' in out)==(method!='static')
    start = cli.prepare(**cli.check_args('digits', 'mlp', method, 0.9, 'erk', 2, None, 128, None, None, 42, 'n.pkl', 'masked'))[1]
    before,after = ({k: v for k,v in m.state_dict().items() if k.endswith('_mask')} for m in (start, load('m.pkl').model))
    assert before.keys()==after.keys() and len(before)==3
    assert all(torch.equal(before[k], after[k]) for k in before)==(method=='static')
    same_counts = all(before[k].sum()==after[k].sum() for k in before)
    assert same_counts or method in ('snfs', 'rigl_avg', 'gmp', 'granet', 'dsr', 'srigl')
    dense = all(m.all() for m in before.values())
    assert dense==(method in ('gmp', 'granet'))

@pytest.mark.parametrize('method', ['static', 'set', 'rigl', 'rigl_avg'])
def test_sparse_storage(command, load, method):
    "The same masks in the end as with masked layers, and a file that holds active weights only"
    for storage in ('masked', 'sparse'):
        code,out,err = command(f'--arch mlp --method {method} --sparsity 0.95 --dist uniform --epochs 2 --storage {storage} --out {storage}.pkl')
        assert (code,err)==(0, '') and table(out)['total'][3]==0.95
    masked,sparse = (as_masked(load(f'{s}.pkl').model) for s in ('masked', 'sparse'))
    assert any(isinstance(m, SparseLinear) for m in load('sparse.pkl').model.modules())
    counts = lambda model: [int(mask.sum()) for _,mask,_ in sparse_params(model)]
    assert counts(masked)==counts(sparse) and len(counts(sparse))==3

def test_storage_that_does_not_serve_a_method(command):
    code,out,err = command('--method snfs --storage sparse')
    assert code==2 and 'snfs' in err and 'static, set, set_original, rigl' in err and err.count('\n')==1

def test_dense_has_no_twin_and_no_table(command, load):
    code,out,err = command('--arch mlp --method dense --epochs 1')
    assert (code,err)==(0, '') and 'twin' not in out and 'layer ' not in out and len(accuracies(out))==1
    assert not list(masked_params(load('sparsefast_digits.pkl').model))

@pytest.mark.parametrize('dist, expect', dict(uniform=[0.8]*4, first_dense=[0, 0.8, 0.8, 0.8], erk=None).items())
def test_dists(command, dist, expect):
    code,out,err = command(f'--arch convnet --epochs 3 --bs 256 --sparsity 0.8 --dist {dist}')
    rows = list(table(out).values())
    assert (code,err)==(0, '')
    if expect: assert [round(r[4], 4) for r in rows[:-1]]==expect
    else:      assert abs(rows[-1][3]-0.8)<1e-3 and rows[2][3]>rows[1][3]>0.5 and rows[0][3]==0

def test_the_twin_differs_by_its_masks_only(command):
    _,out,_ = command('--arch convnet --epochs 2 --sparsity 1e-9 --method rigl --bs 256')
    a,b = last_epochs(out)[:2],last_epochs(out)[2:]
    assert len(a)==len(b)==2 and [r[:4] for r in a]==[r[:4] for r in b]

def test_same_seed_same_result(command, load):
    out,state = {},{}
    for name,seed in dict(a=1, b=1, c=2).items():
        assert command(f'--arch mlp --method set --epochs 2 --bs 256 --seed {seed} --out {name}.pkl')[0]==0
        state[name] = load(f'{name}.pkl').model.state_dict()
    same = lambda a,b: all(torch.equal(v, state[b][k]) for k,v in state[a].items())
    assert same('a', 'b')
    assert not same('a', 'c')

def test_an_interval_too_short_is_a_line_of_warning(command):
    code,out,err = command('--method rigl --arch mlp --epochs 1 --every 3')
    assert code==0 and 'masks change every 3 steps' in out
    assert len(err.splitlines())==1 and err.startswith('warning: updates take the place of 25%')

def test_the_interval_is_the_presets_or_the_users():
    every = lambda method, e, epochs: cli.prepare('digits', 'mlp', method, 0.9, 'erk', epochs, 128, e, 8, 0)[3][0].method.batches_per_update
    assert every('rigl', None, 50)==cli.methods['rigl']['batches_per_update']<1 and every('rigl', 40, 50)==40
    assert every('rigl', None, 2)==10 and every('set', None, 2)==cli.methods['set']['batches_per_update']

# ------------------------------------------------------------ several runs, trained weights, devices
def test_seeds(command, load, here):
    "Every seed is a run like one alone; the table has means and deviations, and the first model is saved"
    single = {}
    for seed in (1, 5):
        assert command(f'--arch mlp --epochs 1 --bs 256 --seed {seed} --out s{seed}.pkl --json r{seed}.json')[0]==0
        single[seed] = json.loads((here/f'r{seed}.json').read_text())['runs']
    code,out,err = command('--arch mlp --epochs 1 --bs 256 --seeds 1,5 --json r.json')
    results = json.loads((here/'r.json').read_text())
    same = lambda run: (run['name'], run['seed'], run['accuracy'], run['file'])
    assert code==0 and [*map(same, results['runs'])]==[*map(same, single[1]+single[5])] and results['seeds']==[1, 5]
    assert '; seeds 1, 5\n' in out and out.count('\nSeed 5\n')==1 and out.count('Seed')==1
    for name in ('dense', 'sparse (rigl_avg)'):
        acc = [100*r['accuracy'] for r in results['runs'] if r['name']==name]
        row = next(l for l in out[out.index('total'):].splitlines() if l.startswith(name))
        assert f'{np.mean(acc):.2f}% ± {np.std(acc, ddof=1):.2f}' in row
    first,alone = (load(f).model.state_dict() for f in ('sparsefast_digits.pkl', 's1.pkl'))
    assert all(torch.equal(v, alone[k]) for k,v in first.items())

def test_seeds_of_dense_runs(command):
    code,out,err = command('--arch mlp --method dense --epochs 1 --bs 256 --seeds 2')
    assert (code,err)==(0, '') and re.search(r'^accuracy: [\d.]+% ± [\d.]+$', out, re.M)

@pytest.mark.parametrize('given, seeds', [(None, [7]), (3, [7, 8, 9]), ('3', [7, 8, 9]), (1, [7]), ('4,2', [4, 2]), ([4, 2], [4, 2]), (range(2), [0, 1])])
def test_lists_of_seeds(given, seeds): assert options.check_seeds(given, 7)==seeds

@pytest.fixture
def offline(monkeypatch):
    "A stand-in for the servers of torchvision and timm: files of 1000 classes, made of random numbers, once each"
    import timm, torchvision
    made = {}
    def weights(arch, make):
        if arch not in made: made[arch] = {k: torch.randn_like(v) if v.is_floating_point() else v for k,v in make().state_dict().items()}
        return made[arch]
    def download(url, *args, **kwargs):
        if 'resnet50' in url: raise OSError('no route to host')
        return weights('resnet18', torchvision.models.resnet18)
    real = timm.create_model
    def create(arch, pretrained=False, num_classes=1000):
        model = real(arch, num_classes=num_classes)
        if pretrained: model.load_state_dict({k: v for k,v in weights(arch, partial(real, arch)).items() if v.shape==model.state_dict()[k].shape}, strict=False)
        return model
    monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', download)
    monkeypatch.setattr(timm, 'create_model', create)
    return made

@pytest.mark.parametrize('arch, head', [('resnet18', 'fc'), ('resnet10t', 'fc')])
def test_pretrained_models_have_the_weights_but_for_the_head(offline, arch, head):
    pytest.importorskip('timm')
    state = models.make_model(arch, 32, 3, 7, pretrained=True).state_dict()
    assert state[f'{head}.weight'].shape[0]==7 and {k for k,v in state.items() if not v.equal(offline[arch][k])}=={f'{head}.weight', f'{head}.bias'}

def test_pretrained_keeps_the_largest_weights(offline):
    "In each layer, at the sparsity of the distribution"
    _,model,twin,_ = cli.prepare(**cli.check_args('digits', 'resnet18', 'rigl', .9, 'uniform', 1, None, 64, None, 32, 42, 'm.pkl', 'masked', pretrained=True))
    masks = {n: m for n,m in model.named_buffers() if n.endswith('_mask')}
    for n,mask in masks.items():
        w = twin.get_parameter(n.removesuffix('_mask')).abs()
        assert w[mask].min()>=w[~mask].max() and abs(mask.float().mean()-.1)<1e-3
    assert len(masks)==21

def test_weights_that_cannot_be_had(offline, command, here):
    code,out,err = command('--arch resnet50 --pretrained')
    assert code==2 and out=='' and "weights of 'resnet50', which cannot be had: no route to host" in err and len(err.splitlines())==1 and not list(here.iterdir())

def test_device(command, here):
    code,out,err = command('--arch mlp --epochs 1 --bs 256 --device cpu --json r.json')
    assert code==0 and json.loads((here/'r.json').read_text())['device']=='cpu'

def test_device_reaches_data_and_model(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, 'get_dls', lambda *args: seen.append(args) or (_ for _ in ()).throw(ValueError('stop')))
    with pytest.raises(ValueError, match='stop'): cli.sparsefast_train(device='cpu')
    assert seen[0][-1]==torch.device('cpu')

# ------------------------------------------------------------ images in folders
def too_short(n): return f'warning: --every 10: no update falls into {n} optimizer steps, so the masks will stay what they are: use a shorter interval\n'

def test_folder_with_a_seeded_split(command, load, here):
    folder(here.parent/'pets')
    code,out,err = command(f'--data {here.parent}/pets --arch convnet --epochs 1 --size 16 --every 10')
    assert (code,err)==(0, too_short(2)) and '16 images to train on and 4 to validate on, 16x16, 2 classes' in out
    learn = load('sparsefast_pets.pkl')
    assert list(learn.dls.vocab)==['cat', 'dog'] and learn.predict(here.parent/'pets'/'cat'/'0.png')[0] in ('cat', 'dog')

def test_folder_with_train_and_valid(here):
    folder(here/'train', n=6)
    folder(here/'valid', n=3, start=100)
    dls = datasets.get_dls('.', 16, 3)
    assert {f.parent.parent.name for f in dls.train.items}=={'train'} and {f.parent.parent.name for f in dls.valid.items}=={'valid'}
    assert (len(dls.train.items),len(dls.valid.items))==(12, 6)

def test_split_depends_on_the_seed(here):
    folder(here, n=12, side=8)
    valid = [sorted(datasets.image_files(here, seed)[1]) for seed in (1, 1, 2)]
    assert valid[0]==valid[1]!=valid[2]

def test_resnet18_on_a_folder(command, load, here):
    folder(here/'pets', n=6)
    code,out,err = command('--data pets --arch resnet18 --epochs 1 --size 32 --out r.pkl --method rigl')
    assert (code,err)==(0, too_short(1)) and len(table(out))==22 and table(out)['total'][3]==0.95
    masked = list(masked_params(as_masked(load('r.pkl').model)))
    assert len(masked)>15 and all((p[~mask]==0).all() for *_,p,mask in masked)

# ------------------------------------------------------------ Fashion-MNIST and MNIST
def test_fashion_reads_idx_files(here, monkeypatch):
    rng = np.random.default_rng(0)
    images,labels = rng.integers(0, 256, (30, 28, 28)),np.arange(30)%10
    monkeypatch.setattr(datasets, 'fashion_path', here)
    for part,s in dict(train=slice(20), t10k=slice(20, 30)).items():
        idx(here/f'{part}-images-idx3-ubyte.gz', images[s])
        idx(here/f'{part}-labels-idx1-ubyte.gz', labels[s])
    items,valid,classes,_ = datasets.fashion_source(28, 1, 0)
    assert list(valid)==list(range(20, 30)) and len(classes)==10
    assert all((a==b).all() and l==datasets.fashion_classes[i] for (a,l),b,i in zip(items, images, labels))
    assert datasets.get_dls('fashion', 32, 3, 8).one_batch()[0].shape==(8, 3, 32, 32)

def test_fashion_missing(command, here, monkeypatch):
    monkeypatch.setattr(datasets, 'fashion_path', here/'nowhere')
    code,out,err = command('--data fashion')
    assert code==2 and len(err.splitlines())==1 and 'apt-get install dataset-fashion-mnist' in err and not list(here.iterdir())

def test_mnist(command, here, monkeypatch):
    def offline(url): raise OSError('no route to host')
    monkeypatch.setattr(datasets, 'untar_data', offline)
    code,out,err = command('--data mnist')
    assert code==2 and len(err.splitlines())==1 and 'no route to host' in err and not list(here.iterdir())
    folder(here/'training', n=6, side=20)
    folder(here/'testing', n=2, side=20, start=50)
    monkeypatch.setattr(datasets, 'untar_data', lambda url: here)
    dls = datasets.get_dls('mnist', 28)
    assert dls.one_batch()[0].shape==(8, 1, 28, 28) and {f.parent.parent.name for f in dls.valid.items}=={'testing'}

# ------------------------------------------------------------ wrong values
BAD = {
    '--data nothing': "'nothing'", '--data digit': 'did you mean digits', '--data empty': 'no images', '--data one': "one class, 'cat'",
    '--data broken': '9.png', '--data tiny': 'validate', '--arch resnet81': 'did you mean', '--arch vit_b_16': 'try --size 224', '--arch x': "'x'",
    '--method rigel': 'did you mean rigl', '--dist erdos': 'uniform, first_dense, erk',
    '--sparsity 1.1': '1.1', '--sparsity 1': 'above 0 and below 1, got 1', '--sparsity 0': 'got 0: for a dense model give `--method dense`', '--sparsity -0.1': '-0.1', '--sparsity nan': 'nan', '--sparsity high': "'high'",
    '--epochs 0': 'got 0', '--epochs 1.5': '1.5', '--epochs abc': "'abc'", '--bs 0': 'bs', '--bs many': "'many'", '--bs 5000': '1438',
    '--every 0': 'every', '--every 2.5': '2.5', '--every x': "'x'", '--lr 0': 'above 0', '--lr -1': '-1', '--lr inf': 'inf', '--lr slow': "'slow'",
    '--device abacus': "got 'abacus'", '--device meta': 'device must be one that PyTorch can use here', '--seeds 0': 'got 0', '--seeds 1,1': 'different numbers, got [1, 1]', '--seeds 1,x': "'x'",
    '--pretrained': 'convnet, mlp, wide_mlp, which have no trained weights', '--seed -1': '-1', '--seed s': "'s'", '--size 0': 'size', '--out no/where.pkl': 'no', '--out empty': 'folder', '--out /proc/x.pkl': '/proc/x.pkl',
    '--sparsty 0.9': 'did you mean --sparsity', 'digits': "'digits'"}

def layout(path): return sorted(str(f.relative_to(path)) for f in path.rglob('*'))

@pytest.mark.parametrize('args, says', BAD.items(), ids=list(BAD))
def test_wrong_values(command, here, args, says):
    (here/'empty').mkdir()
    folder(here/'one', ['cat'], n=2)
    folder(here/'tiny', n=1)
    folder(here/'broken')
    (here/'broken'/'cat'/'9.png').write_bytes(b'no image')
    before = layout(here)
    code,out,err = command(args)
    assert code==2 and out=='' and layout(here)==before
    assert len(err.splitlines())==1 and err.startswith('sparsefast_train: ') and says in err and 'Traceback' not in err

def test_wrong_value_in_a_shell(here):
    (here.parent/'entry.py').write_text(ENTRY)
    p = subprocess.run([sys.executable, here.parent/'entry.py', '--epochs', 'abc'], capture_output=True, text=True)
    assert (p.returncode,p.stdout)==(2, '') and p.stderr=="sparsefast_train: epochs must be a whole number, 1 or more, got 'abc'\n" and not list(here.iterdir())

def test_wrong_value_in_python(here):
    with pytest.raises(ValueError, match="method must be one of dense, static, set, .*, got 'rigel': did you mean rigl"): cli.sparsefast_train(method='rigel')
    assert not list(here.iterdir())

def test_wrong_value_within_another_command(here, monkeypatch):
    "`is_cli` is true there as well, yet an exception is what the caller can deal with"
    script = here.parent/'other.py'
    script.write_text("from fastcore.script import call_parse\nfrom sparsefast.cli.train import sparsefast_train\n"
                      "@call_parse\ndef main(): sparsefast_train(method='rigel')\n")
    monkeypatch.setattr(sys, 'argv', ['other'])
    with pytest.raises(ValueError, match='rigel'): runpy.run_path(str(script), run_name='__main__')

def test_unknown_arch_without_timm(command, monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    code,_,err = command('--arch resnet81')
    assert code==2 and 'pip install timm' in err and len(err.splitlines())==1

def test_timm(here):
    pytest.importorskip('timm')
    model = models.zoo('resnet10t')(num_classes=7)
    assert model(torch.zeros(2, 3, 32, 32)).shape==(2, 7)

def test_interrupt(command, here, monkeypatch):
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(cli, 'fit', stop)
    code,out,err = command('--epochs 1')
    assert code==130 and err=='sparsefast_train: interrupted, nothing saved\n' and not list(here.iterdir())

def test_help(command):
    code,out,err = command('--help')
    assert (code,err)==(0, '') and all(f'--{o} ' in out for o in OPTIONS)
    parts = re.split(r'\n\n(\w+):\n', out)
    assert parts[1::2]==['options', *commands.train_groups, 'methods', 'examples'] and parts[-1].count('sparsefast_train ')==2
    assert parts[-3].replace('\n', ' ').split()==', '.join(cli.methods).split()

@pytest.mark.parametrize('main', ['train_main', 'bench_main'])
@pytest.mark.parametrize('option', ['--help', '--version'])
def test_help_and_version_import_nothing_large(main, option):
    code = f"""import sys
from sparsefast.cli.commands import {main}
try: {main}(['{option}'])
except SystemExit as e: assert not e.code
print(*{{m.split('.')[0] for m in sys.modules}} & {{'torch', 'fastai', 'numpy', 'IPython'}}, 'end')"""
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.stderr=='' and p.stdout.endswith('\nend\n'), p.stdout+p.stderr
    if option=='--version': assert p.stdout==f'sparsefast {sparsefast.__version__}\nend\n'

def test_every_option_is_in_one_group():
    for f,groups in ((commands.sparsefast_train, commands.train_groups), (commands.sparsefast_bench, commands.bench_groups)):
        assert sorted(' '.join(groups.values()).split())==sorted(inspect.signature(f).parameters)

def test_imports_without_vision():
    "The default run needs neither torchvision nor fastai.vision"
    code = """import sys; sys.modules['torchvision'] = sys.modules['fastai.vision'] = None
from sparsefast.cli import train as cli, datasets, models
dls = datasets.get_dls('digits', 8)
models.get_model('convnet', dls, 8, 1)"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stderr==''

def test_a_learner_in_place_of_its_model():
    dls = datasets.get_dls('digits', 8)
    learn = cli.get_learner(dls, models.convnet(1, 10))
    models.dry_run(learn, dls)
    assert len(cli.make_sparse(learn, 'rigl', 0.9, 'erk'))==1 and len(sparse_params(learn.model))==2
    assert cli.layer_table(learn)==cli.layer_table(learn.model)
    assert cli.get_learner(dls, learn).model is learn.model
