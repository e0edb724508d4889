"Export of baked models: equal outputs in torch and in onnxruntime, nothing of masks left"
import io, subprocess, sys
import pytest, torch
from torch import nn
from helpers import changed, mlp, snapshot
from sparsefast.ship import export
from sparsefast.ship.deploy import to_fastest
from sparsefast.ship.export import bake, export_model, to_onnx
from sparsefast.sparsify import sparsify_model
from sparsefast.storage import to_sparse_layers

class Two(nn.Module):
    def __init__(self): super().__init__(); self.a = mlp(6, 8, 3)
    def forward(self, x, y, scale=1.): h = self.a(x)+self.a(y)*scale; return dict(out=h, sum=h.sum(1))

def nets():
    torch.manual_seed(0)
    convs = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    return dict(mlp=(mlp(8, 24, 3), torch.randn(4, 8)), convs=(convs, torch.randn(2, 3, 8, 8)), args=(Two(), (torch.randn(2, 6), torch.randn(2, 6))),
                kwargs=(Two(), dict(x=torch.randn(2, 6), y=torch.randn(2, 6))), encoder=(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)))

def call(m, x): return m(**x) if isinstance(x, dict) else m(*x) if isinstance(x, tuple) else m(x)

@pytest.mark.parametrize('fast', [False, True], ids=['masked','fastest'])
@pytest.mark.parametrize('name', nets())
def test_export(name, fast, monkeypatch):
    model,x = nets()[name]
    sparsify_model(model, 0.7)
    before = snapshot(model)
    form = to_fastest(model, x, forms='sparse', seconds=0)[0] if fast else model
    plain,program = bake(form),export_model(form, x)
    assert not changed(before, snapshot(model)) and not any('mask' in k for k in [*plain.state_dict(), *program.state_dict])
    assert [type(m) for m in plain.modules()]==[type(m) for m in nets()[name][0].modules()] and not any(m._forward_pre_hooks for m in plain.modules())
    with torch.no_grad(): torch.testing.assert_close(call(program.module(), x), call(model.eval(), x))

def test_learners():
    class Wrapped: pass
    learn = Wrapped()
    learn.model,x = nets()['mlp']
    sparsify_model(learn.model, 0.7)
    assert torch.equal(bake(learn)(x), learn.model.eval()(x)) and torch.equal(export_model(learn, x).module()(x), bake(learn)(x))

@pytest.mark.parametrize('name', ['mlp','convs','args','kwargs','encoder'])
def test_onnx(name, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model,x = nets()[name]
    sparsify_model(model, 0.7)
    f = to_onnx(model, x, tmp_path/'m.onnx')
    assert [p.name for p in tmp_path.iterdir()]==['m.onnx']
    s = ort.InferenceSession(f, providers=['CPUExecutionProvider'])
    xs = list(x.values()) if isinstance(x, dict) else x if isinstance(x, tuple) else [x]
    got = s.run(None, {i.name: t.numpy() for i,t in zip(s.get_inputs(), xs)})
    with torch.no_grad(): out = call(model.eval(), x)
    for a,b in zip(list(out.values()) if isinstance(out, dict) else [out], got): torch.testing.assert_close(a, torch.from_numpy(b), rtol=1e-4, atol=1e-5)

def test_dynamic_batch(tmp_path):
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model,x = nets()['mlp']
    sparsify_model(model, 0.7)
    f = to_onnx(model, x, tmp_path/'m.onnx', dynamic_shapes=({0: torch.export.Dim('n')},))
    s,x = ort.InferenceSession(f, providers=['CPUExecutionProvider']),torch.randn(9, 8)
    torch.testing.assert_close(model.eval()(x), torch.from_numpy(s.run(None, {s.get_inputs()[0].name: x.numpy()})[0]), rtol=1e-4, atol=1e-5)

def test_wrong_outputs_are_not_written(tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    (tmp_path/'m.onnx').write_bytes(b'old')
    real = export.output_error
    monkeypatch.setattr(export, 'output_error', lambda a, b: real(a, [t*1.01 for t in b]))
    with pytest.raises(RuntimeError, match='nothing has been written'): to_onnx(*nets()['mlp'], tmp_path/'m.onnx')
    assert (tmp_path/'m.onnx').read_bytes()==b'old'

def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match='pip install onnx onnxscript onnxruntime'): to_onnx(*nets()['mlp'], tmp_path/'m.onnx')

# ------------------------------------------------------------ torch's own exporters
def says(e, what):
    "True if an error, or one that it comes from, says so"
    return e is not None and (what in str(e) or says(e.__cause__ or e.__context__, what))

EXPORTERS = dict(export=lambda m, x: torch.export.export(m, (x,)), onnx=lambda m, x: torch.onnx.export(m, (x,), io.BytesIO(), dynamo=True, verbose=False), torchscript=lambda m, x: torch.onnx.export(m, (x,), io.BytesIO(), dynamo=False))
@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('how', EXPORTERS)
@pytest.mark.parametrize('kind', ['linear', 'conv'])
@pytest.mark.filterwarnings('ignore')
def test_compressed_layers_name_the_way_to_export(kind, how, grad):
    if how!='export': pytest.importorskip('onnx'), pytest.importorskip('onnxscript')
    model,x = (nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(1, 8)) if kind=='linear' else (nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1)), torch.randn(1, 3, 6, 6))
    sparsify_model(model, .7)
    to_sparse_layers(model, least=0.)
    model.eval()
    with torch.set_grad_enabled(grad):
        want = model(x)                                                      # (a linear layer remembers its matrix)
        with pytest.raises(Exception) as e: EXPORTERS[how](model, x)
        assert says(e.value, 'is compressed, and cannot be exported: use `export_model` or `to_onnx`')
        assert torch.allclose(export_model(model, x).module()(x), want, atol=1e-5) and model(x).equal(want)
