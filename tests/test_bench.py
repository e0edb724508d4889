"`sparsefast_bench`: the table, from names and files, and one line for wrong values"
import runpy, sys
import pytest, torch
from sparsefast.cli import bench, train as cli, models
from sparsefast.ship.deploy import SpeedTable
from sparsefast.ship.files import save_sparse
from sparsefast.masks import masked_params
from sparsefast.ship.shrink import shrink_model
from sparsefast.sparsify import sparsify_model

@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    "As the console script does it: (exit code, stdout, stderr)"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, 'to_fastest', lambda m, x, margin: real(m, x, margin, seconds=0))
    script = tmp_path/'entry.py'
    script.write_text("import sys\nfrom sparsefast.cli.bench import sparsefast_bench\nsys.exit(sparsefast_bench())\n")
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
