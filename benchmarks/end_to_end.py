"""One network from start to finish: trained dense and sparse, saved, and run: accuracy, file and milliseconds.

    python benchmarks/end_to_end.py train FOLDER SPARSITY [--seed 0]    # 0, 0.9 or 0.95: writes a checkpoint; 10 to 20 minutes each on one core
    python benchmarks/end_to_end.py run FOLDER THREADS                  # appends to end_to_end.jsonl; some two minutes
    python benchmarks/end_to_end.py table                               # prints the rows

A residual network of three stages (64, 128 and 256 channels, two blocks each, 2.8 million weights) on Fashion-MNIST: three epochs of SGD, from the same initial weights, with the same batches. Sparse networks are
trained by `RigL_avg`, masked, as it reads dense gradients at most steps; the first and the last layer stay dense. int8 is onnxruntime's static quantization of the dense network with 256 training images. Accuracy is that of the form
that is timed, on the 10,000 test images, once, after the last epoch, by the run with one thread. The forms take turns; with several threads onnxruntime comes after PyTorch's, because its threads go on spinning."""
import argparse, time, warnings
from functools import partial
from pathlib import Path
from statistics import median
warnings.simplefilter('ignore')
import torch
from torch import nn
from torch.nn import functional as F
from sparsefast.all import *
from sparsefast.ship.timing import paired_times, ratio
from deploy import hardware, session
from records import Records
from fashion_mnist import data

records = Records(__file__)
epochs,batch,top_lr,warm = 3, 128, .1, .2                                    # share of training in which the learning rate rises
sparsities = (0.9, 0.95)

class Block(nn.Module):
    "Two 3x3 convolutions beside a shortcut"
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False),nn.BatchNorm2d(n_out)
        self.conv2,self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False),nn.BatchNorm2d(n_out)
        self.short = nn.Sequential() if n_in==n_out else nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
    def forward(self, x): return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))+self.short(x))

def net(seed=0):
    torch.manual_seed(seed)
    blocks = [Block(i, o, s) for a,b,stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2)) for i,o,s in ((a, b, stride), (b, b, 1))]
    return nn.Sequential(nn.Conv2d(1, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))

def file(folder, sparsity, seed): return folder/f'{sparsity:g}_{seed}.safetensors'

def train(folder, sparsity, seed):
    (x,y),_ = data()
    model = net(seed)
    if sparsity: sparsify_model(model, sparsity, exclude=['0', '11'])
    opt = torch.optim.SGD(model.parameters(), lr=0., momentum=.9, weight_decay=5e-4)
    n_iter = len(x)//batch
    total,step = n_iter*epochs, 0
    method = RigL_avg(seed=seed).in_steps(total)
    model = model.to(memory_format=torch.channels_last)
    batches,start = torch.Generator().manual_seed(seed),time.time()
    for epoch in range(epochs):
        for i in torch.randperm(len(x), generator=batches)[:n_iter*batch].view(n_iter, batch):
            step += 1
            pct = step/total
            for g in opt.param_groups: g['lr'] = top_lr*min(pct/warm, (1-pct)/(1-warm))
            F.cross_entropy(model(x[i]), y[i]).backward()
            if sparsity: method.step(model, opt, step, total=total)
            else: opt.step()
            opt.zero_grad()
            if step%100==0: print(sparsity, step, total, f'{time.time()-start:.0f} s', flush=True)
    save_sparse(model.to(memory_format=torch.contiguous_format), file(folder, sparsity, seed))

def to_int8(model, folder, x):
    "The dense network as onnxruntime runs it in int8"
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    class Reader(CalibrationDataReader):
        def __init__(self): self.left = [{'x': b.numpy()} for b in x.split(1)]
        def get_next(self): return self.left.pop() if self.left else None
    torch.onnx.export(model, (x[:1],), folder/'net.onnx', input_names=['x'], dynamic_axes={'x': {0: 'n'}}, dynamo=False, opset_version=17)
    quant_pre_process(folder/'net.onnx', folder/'pre.onnx')
    quantize_static(folder/'pre.onnx', folder/'int8.onnx', Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    return folder/'int8.onnx'

def accuracy(f, x, y): return round(float((torch.cat([torch.as_tensor(f(b)).float() for b in x.split(1)]).argmax(1)==y).float().mean()), 4)

@torch.no_grad()
def run(folder, threads, seed):
    torch.set_num_threads(threads)
    (x_train,_),(x,y) = data()
    dense = load_sparse(file(folder, 0, seed), net()).eval()
    half = load_sparse(file(folder, 0, seed), net()).eval().bfloat16()
    fs = {'dense float32': dense, 'dense bfloat16': lambda x: half(x.bfloat16())}
    size = {'dense float32': file(folder, 0, seed).stat().st_size, 'dense bfloat16': save_sparse(half, folder/'half.safetensors').stat().st_size}
    for s in sparsities:
        fs[f'sparse {s:.0%}'],_ = to_fastest(load_sparse(file(folder, s, seed), net()).eval(), x[:1])
        size[f'sparse {s:.0%}'] = file(folder, s, seed).stat().st_size
    int8 = to_int8(dense, folder, x_train[:256])
    s = session(int8, threads)
    turns,alone = {n: partial(f, x[:1]) for n,f in fs.items()},{'dense int8': partial(s.run, None, {'x': x[:1].numpy()})}
    if threads==1: turns,alone = turns|alone,{}
    fs['dense int8'],size['dense int8'] = lambda x: s.run(None, {'x': x.numpy()})[0],int8.stat().st_size
    times = paired_times(turns, seconds=20) | (paired_times(alone, seconds=4) if alone else {})
    for n,f in fs.items():
        r,*spread = ratio(times, 'dense float32', n) if n in turns else [median(times['dense float32'])/median(times[n]), None, None]
        records.add(dict(form=n, seed=seed, accuracy=accuracy(f, x, y) if threads==1 else None, bytes=size[n], ms=round(1000*median(times[n]), 3), gain=round(r, 3),
                      quartiles=[q and round(q, 3) for q in spread], **hardware(threads)))

def table():
    "Latest rows, as Markdown"
    found = {(r['form'], r['threads']): r for r in records.rows()}
    names = list(dict.fromkeys(n for n,_ in found))
    lines = ['| network | accuracy | file (kB) | ms, one thread | ms, two threads |', '|---|---:|---:|---:|---:|']
    for n in names:
        a,b = found[n, 1],found.get((n, 2))
        ms = [f"{r['ms']:.2f} ({r['gain']:.2f}x)" if r else '' for r in (a, b)]
        lines.append(f"| {n} | {100*a['accuracy']:.2f} % | {a['bytes']/1000:.0f} | {' | '.join(ms)} |")
    return '\n'.join(lines)

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=['train', 'run', 'table'])
    ap.add_argument('folder', nargs='?', type=Path)
    ap.add_argument('number', nargs='?', type=float, help='sparsity, or threads')
    ap.add_argument('--seed', type=int, default=0)
    args = ap.parse_args()
    if args.folder: args.folder.mkdir(exist_ok=True, parents=True)
    if args.what=='train':
        torch.set_num_threads(1)
        train(args.folder, args.number, args.seed)
    elif args.what=='run': run(args.folder, int(args.number), args.seed)
    else: print(table())
