"""Random compressed layers against dense ones in float64

    python benchmarks/fuzz_kernels.py 10000 [--seed 0] [--plain] [--threads 1 2 3]

Draws layers of any kind, size, density and memory layout, and compares outputs and the gradients of inputs, values and bias. Some have a NaN or an infinity in one example: it must reach what active weights
bring it to, and nothing else. Fails at the first difference, with the layer and its seed: `--seed S 1` draws that one again. `--plain` goes without the compiled kernel."""
import argparse, copy, random, time, warnings
from collections import Counter
import torch, torch.nn.functional as F
from torch import nn
from sparsefast import ops
from sparsefast.storage import SparseConv1d, SparseConv2d, SparseLinear

KINDS = {nn.Linear: SparseLinear, nn.Conv1d: SparseConv1d, nn.Conv2d: SparseConv2d}
LAYOUTS = ['plain']*4+['channels_last', 'slice', 'transposed', 'expanded', 'offset']
DENSITIES = [0., 'one', .02, .1, .1, .3, 1., 'rows', 'one row', 'one column']

# ------------------------------------------------------------ drawing
def some(rng, high): return rng.choice([1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, rng.randint(1, high)]) if rng.random()<.5 else rng.randint(1, high)

def draw_conv(rng, n_dim):
    pick = lambda of: tuple(rng.choice(of) for _ in range(n_dim))
    k = pick([1, 1, 2, 3, 3, 4, 5, 6, 7])
    kwargs = dict(kernel_size=k, stride=pick([1, 1, 1, 2, 3, 4]), dilation=pick([1, 1, 2, 3]), padding=tuple(rng.choice([0, 0, 1, 2, n//2, n, n+3]) for n in k))
    if rng.random()<.1: kwargs |= dict(padding='same', stride=1)
    if rng.random()<.2: kwargs['padding_mode'] = rng.choice(['reflect', 'replicate', 'circular'])
    groups,how = 1,rng.random()
    if how<.15: groups = rng.randint(2, 6)
    c_in,c_out = groups*rng.randint(1, 70//groups),groups*rng.randint(1, 70//groups)
    if how>.85: c_in = groups = rng.randint(1, 70); c_out = groups*rng.choice([1, 1, 2])
    high_wide = rng.choice([(1,1), (1,rng.randint(1, 300)), (rng.randint(1, 300),1), (rng.randint(1, 7),)*2, (8,8), (16,16)]+[(rng.randint(1, 40), rng.randint(1, 40))]*6)
    if n_dim==1: high_wide = (rng.choice([1, rng.randint(1, 40), rng.randint(1, 600)]),)
    return dict(in_channels=c_in, out_channels=c_out, groups=groups, **kwargs), high_wide

def draw(rng, most=5e6):
    "Settings of a layer that takes at most so many multiplications when dense"
    while True:
        cls,n,bias = rng.choice([nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv2d]),rng.choice([0, 1, 1, 2, 3, rng.randint(0, 70)]),rng.random()<.6
        if cls is nn.Linear:
            kwargs = dict(in_features=some(rng, 700) if rng.random()<.8 else rng.randint(700, 3000), out_features=some(rng, 300))
            n = rng.choice([n, some(rng, 70), rng.randint(0, 200)])
            shape,work = (n, kwargs['in_features']),kwargs['in_features']*kwargs['out_features']
        else:
            kwargs,pixels = draw_conv(rng, 1+(cls is nn.Conv2d))
            shape = n, kwargs['in_channels'], *pixels
            work = kwargs['in_channels']*kwargs['out_channels']//kwargs['groups']*torch.Size(pixels).numel()*torch.Size(kwargs['kernel_size']).numel()
        if n*work<=most: return cls, dict(kwargs, bias=bias), shape

def draw_mask(rng, shape):
    how,flat = rng.choice(DENSITIES),torch.zeros(shape[0], torch.Size(shape[1:]).numel(), dtype=torch.bool)
    if how=='one': flat.view(-1)[rng.randrange(flat.numel())] = True
    elif how=='rows': flat |= (torch.rand(flat.shape)<.3)&(torch.rand(len(flat), 1)<.5)
    elif how=='one row': flat[rng.randrange(len(flat))] = torch.rand(flat.shape[1])<.5
    elif how=='one column': flat[:,rng.randrange(flat.shape[1])] = torch.rand(len(flat))<.7
    else: flat |= torch.rand(flat.shape)<how
    return flat.view(shape)

def laid_out(rng, shape, dtype):
    "Random numbers that lie in memory in some way"
    how,t = rng.choice(LAYOUTS),torch.randn(shape, dtype=dtype)
    if how=='channels_last' and len(shape)==4: return t.to(memory_format=torch.channels_last)
    if how=='slice': return torch.randn(*shape[:-1], 2*shape[-1]+1, dtype=dtype)[...,1::2]
    if how=='transposed': return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how=='expanded': return t[:1].expand(shape) if rng.random()<.5 else t[:,:1].expand(shape)
    if how=='offset': return torch.randn(t.numel()+1, dtype=dtype)[1:].view(shape)            # not aligned
    return t

# ------------------------------------------------------------ comparing
def near(name, got, want, size, rtol):
    assert got.shape==want.shape, f'{name}: shape {tuple(got.shape)}, must be {tuple(want.shape)}'
    wrong = ~((got.double()-want).abs()<=rtol*size+1e-30)
    assert not wrong.any(), f'{name}: {int(wrong.sum())} of {wrong.numel()} numbers differ, first at {wrong.nonzero()[0].tolist()}: {got[wrong][0].item()}, must be {want[wrong][0].item()}'

def dense_results(layer, x, g, add, weight, bias):
    "[output, gradients of x and weight] of a dense layer in float64"
    layer.weight.data,x = weight,x.clone().requires_grad_()
    if layer.bias is not None: layer.bias.data = bias
    y = layer(x)
    return [y.detach() if add is None else y.detach()+add, *torch.autograd.grad(y, [x, layer.weight], g)]

def check_poison(sparse, dense, x, g, mask, rng):
    "A number that is not finite must be where active weights bring it to"
    bad,at = rng.choice([float('nan'), float('inf'), float('-inf')]),rng.randrange(x.numel())
    if rng.random()<.5 and g.numel(): g,of = g.clone(),'g'
    else: x,of = x.clone(),'x'
    target = x if of=='x' else g
    target.view(-1)[at%target.numel()] = bad
    where = lambda t: (~t.isfinite()).double()
    x = x.requires_grad_()
    y = sparse(x)
    grads = torch.autograd.grad(y, [x, sparse.values], g)
    zero = None if dense.bias is None else torch.zeros_like(dense.bias)
    seen = dense_results(dense, where(x.detach()), where(g), None, mask.double(), zero)
    near('output beside '+str(bad), where(y.detach()), seen[0].gt(.5).double(), 0., 0.)
    near('input gradient beside '+str(bad), where(grads[0]), seen[1].gt(.5).double(), 0., 0.)
    ones = [torch.ones_like(t, dtype=torch.float64) for t in (x.detach(), g)]
    least = sum(dense_results(dense, *pair, None, mask.double(), zero)[2][mask] for pair in ((where(x.detach()), ones[1]), (ones[0], where(g)))).gt(.5)
    most = least
    if of=='g': most = where(g).sum([0, *range(2, g.dim())]).gt(0).view(-1, *[1]*(mask.dim()-1)).expand(mask.shape)[mask]    # zeros of the padding may count
    got = where(grads[1]).bool()
    assert not (least&~got).any(), f'value gradients: {int((least&~got).sum())} must not be finite beside {bad} in {of}'
    if mask.dim()>2: most = got                                              # a run has columns that do not count: zero times what is there
    assert not (got&~most).any(), f'value gradients: {int((got&~most).sum())} must be finite beside {bad} in {of}'

def check(seed, threads=(1, 2, 3), most=5e6):
    "Draw a layer and compare it; what kind it was, and an `AssertionError` if it differs"
    rng = random.Random(seed)
    torch.manual_seed(seed)
    cls,kwargs,shape = draw(rng, most)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    layer = cls(**kwargs, dtype=dtype)
    mask = draw_mask(rng, layer.weight.shape)
    layer.weight.data.normal_().mul_(mask)
    if rng.random()<.1 and layer.bias is not None: layer.bias.data = torch.randn(2*len(layer.bias), dtype=dtype)[::2]
    layer.register_buffer('weight_mask', mask)
    sparse,dense = KINDS[cls].from_masked(layer),copy.deepcopy(layer).double()
    x,n_threads = laid_out(rng, shape, dtype),rng.choice(threads)
    says = f'seed {seed}: {sparse} {dtype} of {tuple(mask.shape)} for {shape}, strides {x.stride()}, {kwargs}, {n_threads} threads'
    torch.set_num_threads(n_threads)
    try: out = dense(x.double()).shape
    except (RuntimeError, ValueError):
        try: sparse(x)
        except (RuntimeError, ValueError): return 'refused'
        raise AssertionError(f'must be refused, as the dense layer does\n{says}')
    g = laid_out(rng, out, dtype)
    add = laid_out(rng, out, dtype) if rng.random()<.3 else None
    relu,rtol = rng.random()<.3,256*torch.finfo(dtype).eps
    weight,bias,wide = layer.weight.detach().double(),None if layer.bias is None else layer.bias.detach().double(),None if add is None else add.double()
    absolute = lambda t: None if t is None else t.abs()
    size = dense_results(dense, *map(absolute, (x.double(), g.double(), wide, weight, bias)))
    want = dense_results(dense, x.double(), g.double(), wide, weight, bias)
    try:
        with torch.no_grad(): y = sparse(x, add, relu)
        near('output', y, want[0].relu() if relu else want[0], size[0], rtol)
        if relu: g = g*(want[0]>rtol*size[0])                                # no gradient where rounding decides
        if relu: want = dense_results(dense, x.double(), g.double(), wide, weight, bias)
        leaf = x.detach().requires_grad_()
        y = sparse(leaf, add, relu)
        near('output in training', y.detach(), want[0].relu() if relu else want[0], size[0], rtol)
        grads = torch.autograd.grad(y, [leaf, sparse.values]+([] if bias is None else [sparse.bias]), g)
        near('input gradient', grads[0], want[1], size[1], rtol)
        near('value gradient', grads[1], want[2][mask], size[2][mask], rtol)
        if bias is not None: near('bias gradient', grads[2], g.double().sum([0, *range(2, g.dim())]), g.double().abs().sum([0, *range(2, g.dim())]), rtol)
        if ops._kernels is not None and x.numel() and rng.random()<.2: check_poison(sparse, dense, x.contiguous(), g.contiguous(), mask, rng)
    except AssertionError as e: raise AssertionError(f'{e}\n{says}, add {None if add is None else add.stride()}, relu {relu}') from None
    return cls.__name__

def main(n, seed, plain, threads):
    if plain: ops._kernels = None
    elif ops._kernels is None: raise SystemExit('there is no compiled kernel: build it, or give --plain')
    warnings.filterwarnings('ignore')
    kinds,start = Counter(),time.time()
    for s in range(seed, seed+n):
        kinds[check(s, threads, 1e8 if s%20==0 else 5e6)] += 1
        if (s-seed)%500==499: print(s-seed+1, dict(kinds), f'{time.time()-start:.0f} s', flush=True)
    print(f'{n} layers from seed {seed} agree with dense ones, {"without" if ops._kernels is None else "with"} the kernel:', dict(kinds), f'{time.time()-start:.0f} s')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('n', type=int)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--plain', action='store_true')
    p.add_argument('--threads', type=int, nargs='+', default=[1, 2, 3])
    main(**vars(p.parse_args()))
