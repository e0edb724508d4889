"`sparsefast_bench`: the table, from names and files, and one line for wrong values"
import runpy, sys
import pytest, torch
from sparsefast.cli import bench, train as cli, models
from sparsefast.ship.deploy import SpeedTable
from sparsefast.ship.files import save_sparse
from sparsefast.masks import masked_params
from sparsefast.ship.shrink import shrink_model
from sparsefast.sparsify import sparsify_model
from sparsefast.storage import to_sparse_layers

@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    "As the console script does it: (exit code, stdout, stderr)"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, 'to_fastest', lambda m, x, margin: real(m, x, margin, seconds=0))
    script = tmp_path/'entry.py'
    script.write_text("import sys\nfrom sparsefast.cli.commands import bench_main\nsys.exit(bench_main())\n")
    def run(args):
        monkeypatch.setattr(sys, 'argv', ['sparsefast_bench', *args.split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: runpy.run_path(str(script), run_name='__main__')
        return e.value.code or 0, *capsys.readouterr()
    return run
real = bench.to_fastest

def names(out): return [l.split()[0] for l in out.splitlines()[2:-1]]

@pytest.mark.parametrize('args, layers', [('mlp', ['1','3','5']), ('convnet --sparsity 0.8 --dist uniform --batch 2', ['0.0','1.0','2.0','5']), ('mlp --size 8 --channels 3 --classes 4 --margin 2', ['1','3','5'])])
def test_names(command, args, layers):
    before = torch.get_num_threads()
    code,out,err = command(f'{args} --threads 1')
    lines = out.splitlines()
    assert (code,err)==(0, '') and '1 thread,' in lines[0] and lines[1].split()[:2]==['layer','weight'] and lines[-1].startswith('whole model')
    assert set(names(out)) <= set(layers) and len(names(out))>=2 and torch.get_num_threads()==before

def test_timm(command):
    pytest.importorskip('timm')
    code,out,err = command('resnet10t --size 32 --dist uniform')
    assert (code,err)==(0, '') and 'layer1.0.conv1' in names(out)

def test_compact_checkpoint(command, tmp_path):
    torch.manual_seed(0)
    model = models.mlp(64, 7)
    sparsify_model(model, 0.99)
    save_sparse(model, tmp_path/'m.safetensors')
    save_sparse(shrink_model(model, torch.randn(2, 1, 8, 8))[0], tmp_path/'small.safetensors')
    for f,width in (('m', 300), ('small', None)):
        code,out,err = command(f'{f}.safetensors --arch mlp --size 8')
        assert (code,err)==(0, ''), err
        rows = out.splitlines()[2].split()[1]
        assert rows.endswith('x64') and (rows=='300x64')==(f=='m')

def test_pickle_of_sparsefast_train(command, tmp_path):
    learn = cli.sparsefast_train('digits', 'mlp', epochs=1, bs=512, out=str(tmp_path/'d.pkl'))
    code,out,err = command('d.pkl --size 8')
    assert (code,err)==(0, '') and names(out)==['1','3','5']

@pytest.fixture
def shapes(command, monkeypatch):
    "Shapes of the batches that were timed, without timing them"
    seen = []
    monkeypatch.setattr(bench, 'to_fastest', lambda m, x, margin: (m, seen.append(tuple(x.shape)) or SpeedTable([], dict(dense=1., fast=1., gain=(1., 1., 1.)), '')))
    return seen

@pytest.mark.filterwarnings('ignore:batches_per_update')
@pytest.mark.parametrize('args, shape', [('', (1,1,8,8)), ('--batch 3', (3,1,8,8)), ('--size 12 --channels 1', (1,1,12,12))])
def test_a_pickle_knows_its_images(command, shapes, tmp_path, args, shape):
    "Of `sparsefast_train`: a network without convolutions too, where nothing else would tell"
    cli.sparsefast_train('digits', 'mlp' if 'size' not in args else 'convnet', epochs=1, bs=512, out=str(tmp_path/'d.pkl'))
    code,out,err = command(f'd.pkl {args}')
    assert (code,err)==(0, '') and shapes==[shape]

def colours(path, tfms, n=12):
    from PIL import Image
    from fastai.vision.all import ImageDataLoaders
    for k in range(2*n):
        (path/'in'/'ab'[k%2]).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (30,30), (k,2*k,90*(k%2))).save(path/'in'/'ab'[k%2]/f'{k}.png')
    return ImageDataLoaders.from_folder(path/'in', valid_pct=.25, seed=0, bs=4, num_workers=0, **tfms)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('storage', ['masked', 'sparse'])
@pytest.mark.parametrize('kind', ['item', 'batch'])
def test_an_exported_colour_learner(command, shapes, tmp_path, kind, storage):
    "Channels by its first convolution, and the size by the last transform that has one"
    from fastai.vision.all import Resize, aug_transforms, vision_learner, xresnet18
    tfms = dict(item=dict(item_tfms=Resize((24, 40))), batch=dict(item_tfms=Resize(30), batch_tfms=aug_transforms(size=24)))[kind]
    learn = vision_learner(colours(tmp_path, tfms), xresnet18, pretrained=False)
    sparsify_model(learn, .9)
    if storage=='sparse': to_sparse_layers(learn)
    learn.export(tmp_path/'c.pkl')
    code,out,err = command('c.pkl --batch 2')
    assert (code,err)==(0, '') and shapes==[(2, 3, 24, 40 if kind=='item' else 24)], err

ONLY_FOR = {'--arch resnet18': "arch must be given with a compact checkpoint only, got 'resnet18' and what='resnet18': did you mean sparsefast_bench resnet18", '--arch nope': "got 'nope'",
            'mlp --arch convnet': 'did you mean sparsefast_bench convnet', 'd.pkl --arch mlp': "got 'mlp' and what='d.pkl'", 'd.pkl --sparsity 0.5': 'sparsity must be left out for a file, which has its own, got 0.5',
            'm.safetensors --arch mlp --size 8 --dist uniform': "dist must be left out for a file, which has its own, got 'uniform'", 'm.safetensors --arch mlp --classes 3': 'classes must be left out'}
@pytest.mark.parametrize('args, says', ONLY_FOR.items(), ids=list(ONLY_FOR))
def test_what_would_be_ignored_is_refused(command, tmp_path, args, says):
    sparsify_model(model := models.mlp(64, 7), 0.9)
    save_sparse(model, tmp_path/'m.safetensors')
    (tmp_path/'d.pkl').write_bytes(b'nothing')
    code,out,err = command(args)
    assert code==2 and out=='' and len(err.splitlines())==1 and says in err

def test_in_python(monkeypatch):
    monkeypatch.setattr(bench, 'to_fastest', lambda m, x, margin: real(m, x, margin, seconds=0))
    table = bench.sparsefast_bench('mlp', threads=1)
    assert isinstance(table, SpeedTable) and len(table.rows)>=2
    with pytest.raises(ValueError, match='batch'): bench.sparsefast_bench('mlp', batch=0)

BAD = {'resnet81': 'did you mean', 'nothing.pkl': "an existing file, got 'nothing.pkl'", 'no/where.safetensors': 'an existing file', 'folder': 'got the folder', 'broken.pkl': 'must be a file of sparsefast_train',
       'broken.safetensors --arch mlp': 'cannot be loaded', 'm.safetensors': 'pass --arch', 'm.safetensors --arch mlp --size 9': 'try another --size', 'm.safetensors --arch nets': "'nets'",
       'mlp --sparsity 95': 'sparsity', 'mlp --sparsity nan': 'nan', 'mlp --batch 0': 'batch', 'mlp --batch 1.5': '1.5', 'mlp --size x': "'x'", 'mlp --channels 0': 'channels', 'mlp --classes 0': 'classes',
       'mlp --threads 0': 'threads', 'mlp --margin 0.5': 'margin', 'mlp --seed -1': 'seed', 'mlp --dist erdos': 'uniform, first_dense, erk', 'mlp --sparsty 0.9': 'did you mean --sparsity',
       'mlp --sparsity 0': 'no masks', 'vit_b_16 --size 30': 'try another --size', 'mlp other': "'other'"}
@pytest.mark.parametrize('args, says', BAD.items(), ids=list(BAD))
def test_wrong_values(command, tmp_path, args, says):
    (tmp_path/'folder').mkdir()
    for f in ('broken.pkl', 'broken.safetensors'): (tmp_path/f).write_bytes(b'nothing')
    sparsify_model(model := models.mlp(64, 7), 0.9)
    save_sparse(model, tmp_path/'m.safetensors')
    code,out,err = command(args)
    assert code==2 and out=='' and len(err.splitlines())==1 and err.startswith('sparsefast_bench: ') and says in err and 'Traceback' not in err

def test_interrupt(command, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(bench, 'to_fastest', stop)
    assert command('mlp')[::2]==(130, 'sparsefast_bench: interrupted\n')

def test_help(command):
    code,out,err = command('--help')
    assert code==0 and all(f'--{o}' in out for o in 'arch sparsity dist batch size channels classes threads margin seed'.split())
