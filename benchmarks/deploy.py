"""What sparsity is worth at inference: whole networks and single layers, beside dense float32, bfloat16 and onnxruntime (float32, int8).

    python benchmarks/deploy.py onnx FOLDER                      # writes the models for onnxruntime; some minutes
    python benchmarks/deploy.py net ARCH BATCH THREADS FOLDER    # appends to deploy_nets.jsonl; one to three minutes each
    python benchmarks/deploy.py layers THREADS                   # appends to deploy_layers.jsonl; some minutes, in parts
    python benchmarks/deploy.py zeros ARCH THREADS FOLDER        # appends to deploy_zeros.jsonl: what runtimes do with zeros

Masks are random and uniform, over everything but the first and the last layer; time does not depend on what a network has learnt. PyTorch's forms of a network take turns, in changing
order; a number is a median over rounds, and a ratio is a median of ratios within rounds. With one thread onnxruntime takes turns with them; with several it comes after them, each form alone, and its ratio is one of medians. What this kind of processor has run already is skipped."""
import sys, warnings
from functools import partial
from pathlib import Path
from statistics import median
warnings.simplefilter('ignore')
import timm, torch
from torch import nn
from sparsefast import ops
from sparsefast.ship.deploy import paired_times, processor, ratio, sparse_form, to_fastest
from sparsefast.sparsify import sparsify_model, unsparsify_model
from records import Records

archs      = dict(resnet18='resnet18', resnet50='resnet50', vit384='vit_small_patch16_224')
sparsities = (0.8, 0.9, 0.95)
here       = Path(__file__).parent

def net(arch):
    torch.manual_seed(0)
    return timm.create_model(archs[arch]).eval()

def images(batch): return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))

def sparse(arch, sparsity):
    model = net(arch)
    names = [n for n,m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    sparsify_model(model, sparsity, exclude=[names[0], names[-1]])
    return model

def hardware(threads):
    import onnxruntime
    return dict(processor=processor(), threads=threads, kernel=getattr(ops._kernels, 'processor', 'torch'), torch=torch.__version__, onnxruntime=onnxruntime.__version__, timm=timm.__version__)

# ------------------------------------------------------------ onnxruntime
def write_onnx(folder):
    "float32, and int8 by static quantization with eight images: weights by channel, activations by tensor"
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    class Reader(CalibrationDataReader):
        def __init__(self): self.left = [{'x': images(8)[i:i+1].numpy()} for i in range(8)]
        def get_next(self): return self.left.pop() if self.left else None
    for arch in archs:
        f = folder/f'{arch}.onnx'
        if (folder/f'{arch}.int8.onnx').exists(): continue
        torch.onnx.export(net(arch), (images(1),), f, input_names=['x'], dynamic_axes={'x': {0: 'n'}}, dynamo=False, opset_version=17)
        quant_pre_process(f, folder/f'{arch}.pre.onnx')
        quantize_static(folder/f'{arch}.pre.onnx', folder/f'{arch}.int8.onnx', Reader(), quant_format=QuantFormat.QDQ, per_channel=True)

def session(file, threads):
    import onnxruntime
    o = onnxruntime.SessionOptions()
    o.intra_op_num_threads,o.inter_op_num_threads = threads,1
    return onnxruntime.InferenceSession(file, o, providers=['CPUExecutionProvider'])

# ------------------------------------------------------------ whole networks
def measure_net(arch, batch, threads, folder):
    records = Records(here/'deploy_nets')
    if any((r['arch'], r['batch'], r['threads'], r['processor'])==(arch, batch, threads, processor()) for r in records.rows()): return
    torch.set_num_threads(threads)
    x = images(batch)
    dense,half,hx,nx = net(arch),net(arch).bfloat16(),x.bfloat16(),x.numpy()
    fs = {'dense': partial(dense, x), 'bfloat16': partial(half, hx)}
    chosen,error = {}, {}
    for s in sparsities:
        model = sparse(arch, s)
        fast,table = to_fastest(model, x, seconds=0.04*batch**0.5)
        with torch.no_grad(): error[f'sparse {s}'] = float((fast(x)-model(x)).abs().max()/model(x).abs().max())
        fs[f'sparse {s}'],chosen[f'sparse {s}'] = partial(fast, x),[sum(r.form!='dense' for r in table.rows), len(table.rows)]
    sessions = {n: session(folder/f, threads) for n,f in {'onnxruntime': f'{arch}.onnx', 'onnxruntime int8': f'{arch}.int8.onnx'}.items()}
    others = {n: partial(s.run, None, {'x': nx}) for n,s in sessions.items()}
    if threads==1: fs,others = fs|others,{}
    emulated = {} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {'bfloat16': fs.pop('bfloat16')}    # one pass takes seconds
    times = paired_times(fs, seconds=25, least=7)
    if batch==1: times |= paired_times(emulated, seconds=4, least=3)
    for n,f in others.items(): times |= paired_times({n: f}, seconds=4, least=7)        # several threads go on spinning for a while after each run
    for n,ts in times.items():
        quarter = sorted(ts)[len(ts)//4],sorted(ts)[-1-len(ts)//4]
        r,lo,hi = ratio(times, 'dense', n) if n in fs else (median(times['dense'])/median(ts), median(times['dense'])/quarter[1], median(times['dense'])/quarter[0])
        records.add(dict(arch=arch, batch=batch, form=n, ms=round(1000*median(times[n]), 3), gain=round(r, 3), quartiles=[round(lo, 3), round(hi, 3)], rounds=len(times[n]),
                      layers=chosen.get(n), error=error.get(n), **hardware(threads)))
        print(arch, batch, threads, n, f'{1000*median(times[n]):.1f} ms', f'{r:.2f}x', chosen.get(n, ''), flush=True)

# ------------------------------------------------------------ single layers
def linear(o, i): return lambda: nn.Linear(i, o), lambda b: (b, i)
def conv(o, i, k, side): return lambda: nn.Conv2d(i, o, k, padding=k//2), lambda b: (b, i, side, side)
layers = {'linear 1024x1024': (*linear(1024, 1024), (1, 16, 128)), 'linear 3072x768': (*linear(3072, 768), (1, 16, 128)), 'linear 384x1536': (*linear(384, 1536), (1, 16, 128)),
          'linear 4096x4096': (*linear(4096, 4096), (1, 16, 128)),
          'conv 1x1, 256 to 64, 56x56': (*conv(64, 256, 1, 56), (1, 8)), 'conv 1x1, 1024 to 256, 14x14': (*conv(256, 1024, 1, 14), (1, 8)),
          'conv 3x3, 64 to 64, 56x56': (*conv(64, 64, 3, 56), (1, 8)), 'conv 3x3, 256 to 256, 14x14': (*conv(256, 256, 3, 14), (1, 8))}

def measure_layers(threads):
    records = Records(here/'deploy_layers')
    done = {(r['layer'], r['batch'], r['sparsity'], r['threads']) for r in records.rows() if r['processor']==processor()}
    torch.set_num_threads(threads)
    for name,(make,shape,batches) in layers.items():
        for batch in batches:
            for s in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99):
                if (name, batch, s, threads) in done: continue
                torch.manual_seed(0)
                sparsify_model(m := make(), s)
                fast,x = sparse_form(m),torch.randn(shape(batch))
                unsparsify_model(m)
                times = paired_times(dict(dense=partial(m, x), sparse=partial(fast, x)), seconds=0.5)
                r,lo,hi = ratio(times, 'dense', 'sparse')
                records.add(dict(layer=name, batch=batch, sparsity=s, dense=round(1000*median(times['dense']), 4), sparse=round(1000*median(times['sparse']), 4),
                              gain=round(r, 3), quartiles=[round(lo, 3), round(hi, 3)], rounds=len(times['dense']), **hardware(threads)))

# ------------------------------------------------------------ zeros in other runtimes
def measure_zeros(arch, threads, folder):
    "The same network without zeros and with 95 % of them: files and times"
    from sparsefast.ship.export import export_model, to_onnx
    from sparsefast.ship.files import save_sparse
    records = Records(here/'deploy_zeros')
    if any((r['arch'], r['threads'])==(arch, threads) for r in records.rows()): return
    torch.set_num_threads(threads)
    x,fs,size = images(1),{}, {}
    for n,model in {'no zeros': net(arch), '95 % zeros': sparse(arch, 0.95)}.items():
        f = to_onnx(model, x, folder/'zeros.onnx')
        fs[f'onnxruntime, {n}'] = partial(session(f, threads).run, None, {session(f, threads).get_inputs()[0].name: x.numpy()})
        size[f'onnxruntime, {n}'] = f.stat().st_size
        program = export_model(model, x)
        torch.export.save(program, folder/'zeros.pt2')
        fs[f'torch.export, {n}'],size[f'torch.export, {n}'] = partial(program.module(), x),(folder/'zeros.pt2').stat().st_size
        size[f'save_sparse, {n}'] = save_sparse(model, folder/'zeros.safetensors').stat().st_size
    times = paired_times(fs, seconds=20, least=7)
    for n in size:
        r = ratio(times, n.replace('95 %', 'no'), n) if n in fs else None
        records.add(dict(arch=arch, form=n, bytes=size[n], ms=round(1000*median(times[n]), 3) if r else None, gain=round(r[0], 3) if r else None, quartiles=[round(q, 3) for q in r[1:]] if r else None, **hardware(threads)))

if __name__=='__main__':
    what,*args = sys.argv[1:]
    with torch.no_grad():
        if what=='onnx': Path(args[0]).mkdir(exist_ok=True, parents=True); write_onnx(Path(args[0]))
        elif what=='net': measure_net(args[0], int(args[1]), int(args[2]), Path(args[3]))
        elif what=='zeros': measure_zeros(args[0], int(args[1]), Path(args[2]))
        elif what=='layers': measure_layers(int(args[0]))
