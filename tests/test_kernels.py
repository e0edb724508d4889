"The compiled kernel: random layers, attacks on its operations, threads, and what PyTorch asks of an operation"
import copy, importlib.util, os, random, shutil, subprocess, sys, threading
from pathlib import Path
import pytest, torch
from torch import nn
from torch.utils.checkpoint import checkpoint
import helpers
from sparsefast import ops as loops
from sparsefast.core import sparsify_model
from sparsefast.storage import SparseConv1d, SparseConv2d, SparseLinear, to_sparse_layers
from sparsefast.storage.kernels import index_of, spmm
from sparsefast.storage.planes import Window, backward_images, backward_index, forward_images, forward_offsets

needs_kernel = pytest.mark.skipif(loops._kernels is None, reason='no compiled kernel')
ways = pytest.mark.parametrize('way', [pytest.param('compiled', marks=needs_kernel), 'torch'])
ops = torch.ops.sparsefast

@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)

def use(way, monkeypatch):
    if way=='torch': monkeypatch.setattr(loops, '_kernels', None)

def compressed(layer, kind, density=.3):
    layer.register_buffer('weight_mask', torch.rand(layer.weight.shape)<density)
    layer.weight.data *= layer.weight_mask
    return kind.from_masked(layer)

# ------------------------------------------------------------ random layers
_spec = importlib.util.spec_from_file_location('fuzz_kernels', Path(__file__).parents[1]/'benchmarks'/'fuzz_kernels.py')
fuzz = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz)

@needs_kernel
@pytest.mark.parametrize('first', range(0, 160, 20))
def test_random_layers(first):
    kinds = [fuzz.check(seed, (1, 2), 3e5) for seed in range(first, first+20)]
    assert len(set(kinds)-{'refused'})==3

def test_random_layers_without_the_kernel(monkeypatch):
    monkeypatch.setattr(loops, '_kernels', None)
    for seed in [*range(200, 230), 295]: fuzz.check(seed, (1,), 1e5)                  # 295: a gradient of weights that has no view of one dimension

@ways
def test_any_layout_of_what_is_added(way, monkeypatch):
    use(way, monkeypatch)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    layer.bias.data = torch.randn(12)[::2]
    sparse,x,add = compressed(layer, SparseConv2d),torch.randn(2, 4, 5, 5),torch.randn(2, 6, 5, 5).to(memory_format=torch.channels_last)
    with torch.no_grad(): assert torch.allclose(sparse(x, add, relu=True), (layer(x)+add).relu(), atol=1e-5)

@ways
@pytest.mark.parametrize('make', [lambda: (compressed(nn.Conv1d(4, 6, 3), SparseConv1d), (2,4,9)), lambda: (compressed(nn.Linear(9, 5), SparseLinear), (2,3,9))])
def test_add_and_relu_in_training(way, make, monkeypatch):
    use(way, monkeypatch)
    (sparse,size),x = make(),torch.randn(2, 4, 9)
    x = torch.randn(size)
    want = sparse(x).relu().sum()
    want.backward()
    grad,sparse.values.grad = sparse.values.grad,None
    y = sparse(x, torch.zeros_like(sparse(x)), relu=True)
    y.sum().backward()
    assert torch.allclose(y.sum(), want) and torch.allclose(sparse.values.grad, grad)

# ------------------------------------------------------------ attacks
N,N_IN,N_OUT = 5,7,6
SIZE,WINDOW = (2,3,9,9),Window((3,3), (2,1), (1,2), (1,1,0,2))

def linear_args():
    torch.manual_seed(0)
    crow,col = index_of(torch.rand(N_OUT, N_IN)<.6)
    return dict(crow=crow, col=col, values=torch.randn(len(col)), x=torch.randn(N, N_IN), bias=torch.randn(N_OUT), add=torch.randn(N, N_OUT), relu=False)

def conv_args(name):
    torch.manual_seed(0)
    crow,col = index_of(torch.rand(N_OUT, 27)<.6)
    x,g,settings = torch.randn(SIZE),torch.randn(2, N_OUT, *WINDOW.out_size(9, 9)),list(sum(WINDOW, ()))
    if name=='convolve_back':
        crow,at,perm = backward_index(crow, col, WINDOW, SIZE, 1)
        return dict(crow=crow, at=at, values=torch.randn(len(at)), g=g, size=list(SIZE), settings=settings)
    at = forward_offsets(crow, col, WINDOW, SIZE, 1)
    if name=='convolve_values': return dict(crow=crow, at=at, g=g, x=x, settings=settings)
    return dict(crow=crow, at=at, values=torch.randn(len(at)), x=x, bias=torch.randn(N_OUT), add=torch.randn(g.shape), relu=True, settings=settings)

def args_of(name):
    if name.startswith('conv'): return conv_args(name)
    args = linear_args()
    if name=='spmm': return args
    return dict(crow=args['crow'], col=args['col'], g=torch.randn(N, N_OUT), x=args['x'])

OPS = ['spmm', 'sddmm', 'convolve', 'convolve_back', 'convolve_values']
def call(name, args): return getattr(ops, name)(*args.values())
def put(t, i, v):
    t = t.clone()
    t.view(-1)[i] = v
    return t

INDEX = dict(falls=lambda c, a, n: (put(c, 2, int(c[1])-1), a), below=lambda c, a, n: (put(c, 0, -1), a), beyond=lambda c, a, n: (put(c, -1, len(a)+1), a), huge=lambda c, a, n: (put(c, -1, 2**31-1), a),
             negative=lambda c, a, n: (c, put(a, 0, -1)), lowest=lambda c, a, n: (c, put(a, 0, -2**31)), large=lambda c, a, n: (c, put(a, -1, 2**31-1)), next=lambda c, a, n: (c, put(a, -1, n)), fewer=lambda c, a, n: (c, a[:-1]), long_rows=lambda c, a, n: (c.long(), a),
             long=lambda c, a, n: (c, a.long()), empty=lambda c, a, n: (c[:0], a), flat=lambda c, a, n: (c[0], a), two=lambda c, a, n: (c[None], a), floats=lambda c, a, n: (c, a.float()), two_at=lambda c, a, n: (c, a[None]))
@needs_kernel
@pytest.mark.parametrize('name', OPS)
@pytest.mark.parametrize('attack', INDEX)
def test_bad_index(name, attack):
    args = args_of(name)
    at,limit = ('at' if 'at' in args else 'col'),N_IN
    if at=='at': limit = limit_of(name)
    args['crow'],args[at] = INDEX[attack](args['crow'], args[at], limit)
    with pytest.raises(ValueError): call(name, args)

def limit_of(name):
    "The least offset that is too large: a run of all columns from there would end behind the planes"
    images,channels = (backward_images(WINDOW, SIZE, N_OUT)[0], N_OUT) if name=='convolve_back' else (forward_images(WINDOW, SIZE, N_OUT), SIZE[1])
    return images.offset(channels, 0, 0)-images.at_once*images.slot*images.pitch+1

@needs_kernel
@pytest.mark.parametrize('name', OPS)
def test_offsets_and_rows_at_the_limit(name):
    "The largest offset that is accepted is read without reading past the end: AddressSanitizer knows"
    args = args_of(name)
    at = 'at' if 'at' in args else 'col'
    last = (N_IN if at=='col' else limit_of(name))-1
    args[at] = put(args[at], int(args['crow'][-1])-1, last)
    call(name, args)

@needs_kernel
@pytest.mark.parametrize('name', ['spmm', 'sddmm'])
def test_columns_must_rise(name):
    args = args_of(name)
    row = next(i for i in range(N_OUT) if args['crow'][i+1]-args['crow'][i]>1)
    j = int(args['crow'][row])
    for new in (int(args['col'][j]), int(args['col'][j])-1):
        if new>=0:
            with pytest.raises(ValueError, match='rise'): call(name, {**args, 'col': put(args['col'], j+1, new)})

@needs_kernel
@pytest.mark.parametrize('name', ['convolve', 'convolve_back', 'convolve_values'])
def test_offsets_in_any_order(name):
    "Which the kernel need not refuse: it gives the right result"
    args = args_of(name)
    want,at,values = call(name, args),args['at'].clone(),args.get('values')
    if values is not None: values = args['values'] = values.clone()
    order = torch.arange(len(at))
    for a,b in zip(args['crow'], args['crow'][1:]): order[a:b] = order[a:b].flip(0)
    args['at'] = at[order]
    if values is not None: args['values'] = values[order]
    got = call(name, args)
    assert torch.allclose(got, want[order] if values is None else want, atol=1e-4)

def tensors(args): return [k for k,v in args.items() if torch.is_tensor(v) and v.is_floating_point()]

WRONG = dict(short=lambda t: t[..., :-1], long=lambda t: torch.cat([t, t], -1), more=lambda t: torch.cat([t, t]), none=lambda t: t[:0], scalar=lambda t: t.sum(), deep=lambda t: t[None], double=lambda t: t.double(), half=lambda t: t.half(), int=lambda t: t.int(), complex=lambda t: t.to(torch.complex64))
@needs_kernel
@pytest.mark.parametrize('name', OPS)
@pytest.mark.parametrize('wrong', WRONG)
def test_one_wrong_tensor(name, wrong):
    for k in tensors(args_of(name)):
        args = args_of(name)
        args[k] = WRONG[wrong](args[k])
        if k=='x' and wrong=='long' and not name.startswith('conv'): continue        # a matrix with more columns
        with pytest.raises(ValueError): call(name, args)

@needs_kernel
@pytest.mark.parametrize('name', ['convolve', 'convolve_back', 'convolve_values'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.complex64])
def test_other_dtypes(name, dtype):
    args = args_of(name)
    for k in tensors(args): args[k] = args[k].to(dtype)
    with pytest.raises(ValueError, match='float32 and float64'): call(name, args)

@needs_kernel
@pytest.mark.parametrize('name', OPS)
def test_any_layout(name):
    want = call(name, args_of(name))
    for how in (lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim()>1 else t.repeat_interleave(2)[::2], lambda t: torch.stack([t, t], -1)[..., 0]):
        args = args_of(name)
        for k,v in args.items():
            if torch.is_tensor(v): args[k] = how(v)
        assert torch.equal(call(name, args), want)

BIG = 2**40
@needs_kernel
@pytest.mark.parametrize('name', ['convolve', 'convolve_back', 'convolve_values'])
@pytest.mark.parametrize('i,v', [(i, v) for i in range(10) for v in ([-1, BIG, 2**62] if i>5 else [0, -1, BIG, 2**62])])
def test_wrong_settings(name, i, v):
    args = args_of(name)
    args['settings'][i] = v
    with pytest.raises(ValueError): call(name, args)

@needs_kernel
@pytest.mark.parametrize('name', ['convolve', 'convolve_back', 'convolve_values'])
@pytest.mark.parametrize('settings', [[], [1]*9, [1]*11, [1]*60])
def test_number_of_settings(name, settings):
    with pytest.raises(ValueError): call(name, {**args_of(name), 'settings': settings})

@needs_kernel
@pytest.mark.parametrize('name', ['convolve', 'convolve_back', 'convolve_values'])
def test_an_index_of_other_settings(name):
    "No settings make the kernel read past the end: whatever it accepts, AddressSanitizer has nothing to say about"
    rng,accepted = random.Random(0),0
    for _ in range(300):
        args = args_of(name)
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(10)
            args['settings'][i] = rng.choice([-2, -1, 0, 1, 2, 3, 5, 9]) if i>5 else rng.choice([1, 2, 3, 4])
        try: out = Window(*(tuple(args['settings'][i:i+2]) for i in (0,2,4)), tuple(args['settings'][6:])).out_size(9, 9)
        except ValueError: continue
        if min(out)<1: continue
        for k,channels in (('g', N_OUT), ('add', N_OUT)):
            if k in args: args[k] = torch.randn(2, channels, *out)
        if name=='convolve_back':
            n = args['settings'][2]*args['settings'][3]*3
            args['crow'] = torch.arange(n+1, dtype=torch.int32)
            args['at'],args['values'] = torch.randint(0, 400, (n,), dtype=torch.int32),torch.randn(n)
        try: call(name, args)
        except ValueError: continue
        assert min(args['settings'])>=0
        accepted += 1
    assert accepted>20

@needs_kernel
def test_a_phase_with_fewer_pixels_than_a_tile():
    "Where images are read in place. Its tile began before the first pixel; AddressSanitizer saw it"
    window,size,g = Window((1,1), (2,2), (1,1), (0,0,0,0)),(1,1,15,16),torch.randn(1, 1, 8, 8)
    crow = torch.tensor([0, 0, 0, 0, 1], dtype=torch.int32)
    x = ops.convolve_back(crow, crow[:1], torch.ones(1), g, list(size), list(sum(window, ())))
    assert x[...,1::2,1::2].equal(g[...,:7,:])

@needs_kernel
def test_sizes_for_convolve_back():
    for size in ([2,3,9], [2,3,9,9,1], [], [2,0,9,9], [2,3,0,9], [2,3,-9,9], [-2,3,9,9], [2,2**40,9,9], [2,3,2**40,9], [2**40,3,9,9], [2,3,2**62,2**62]):
        with pytest.raises(ValueError): call('convolve_back', {**args_of('convolve_back'), 'size': size})

@needs_kernel
def test_nothing_to_do():
    none,rows = torch.zeros(0, dtype=torch.int32),torch.zeros(N_OUT+1, dtype=torch.int32)
    one = torch.zeros(1, dtype=torch.int32)
    assert ops.spmm(rows, none, torch.zeros(0), torch.randn(3, 4), torch.ones(N_OUT), None, False).equal(torch.ones(3, N_OUT))
    assert ops.spmm(rows, none, torch.zeros(0), torch.randn(1, 0), None, None, True).equal(torch.zeros(1, N_OUT))
    assert ops.spmm(rows, none, torch.zeros(0), torch.randn(40, 0), None, None, True).equal(torch.zeros(40, N_OUT))
    assert ops.spmm(one, none, torch.zeros(0), torch.randn(3, 4), None, None, False).shape==(3, 0)
    assert ops.spmm(rows, none, torch.zeros(0), torch.randn(0, 4), None, None, False).shape==(0, N_OUT)
    assert ops.spmm(rows, none, torch.zeros(0), torch.randn(0, 2**33), None, None, False).shape==(0, N_OUT)
    assert ops.sddmm(rows, none, torch.randn(3, N_OUT), torch.randn(3, 4)).shape==(0,)
    args = linear_args()
    assert ops.sddmm(args['crow'], args['col'], torch.randn(0, N_OUT), torch.randn(0, N_IN)).equal(torch.zeros(len(args['col'])))
    size = 0,*SIZE[1:]
    for name in ('convolve', 'convolve_back', 'convolve_values'):
        args = args_of(name)
        crow,col = index_of(torch.rand(N_OUT, 27)<.6)
        index = backward_index(crow, col, WINDOW, size, 1) if name=='convolve_back' else (crow, forward_offsets(crow, col, WINDOW, size, 1))
        args |= dict(zip(('crow', 'at'), index))
        if 'values' in args: args['values'] = torch.randn(len(args['at']))
        n = len(args['at'])
        for k in ('x', 'g', 'add'):
            if k in args: args[k] = args[k][:0]
        if 'size' in args: args['size'][0] = 0
        got = call(name, args)
        assert got.equal(torch.zeros(n)) if name=='convolve_values' else len(got)==0

@needs_kernel
def test_a_changed_index():
    "In place, between two calls: nothing is read out of bounds"
    sparse,x = compressed(nn.Linear(9, 13), SparseLinear),torch.randn(6, 9)
    sparse(x)
    sparse.col[0] = 99
    with pytest.raises(ValueError, match='below 9'): sparse(x)
    sparse.col[0] = -1
    with pytest.raises(ValueError): sparse(x)
    sparse.col[0] = 0
    sparse.crow[-1] += 1
    with pytest.raises(ValueError, match='within its values'): sparse(x)

@ways
@pytest.mark.parametrize('forge', [lambda s: s['col'].fill_(99), lambda s: s['col'].neg_().sub_(1), lambda s: s['crow'].add_(1), lambda s: s['crow'][1].fill_(2**31-1), lambda s: s['col'].copy_(s['col'].flip(0))])
def test_a_forged_state(way, forge, monkeypatch):
    use(way, monkeypatch)
    sparse,x = compressed(nn.Linear(9, 13), SparseLinear),torch.randn(6, 9)
    state,want = copy.deepcopy(sparse.state_dict()),sparse(x)
    forge(state)
    with pytest.raises(RuntimeError, match='(crow|col) must'): sparse.load_state_dict(state)
    assert sparse(x).equal(want)

# ------------------------------------------------------------ threads
MODELS = dict(linear=(lambda: compressed(nn.Linear(300, 200), SparseLinear, .1), (65,300)), conv=(lambda: compressed(nn.Conv2d(8, 16, 3, stride=2, padding=1), SparseConv2d, .2), (9,8,17,15)))
def forward_and_backward(sparse, x):
    x = x.clone().requires_grad_()
    y = sparse(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, sparse.values])]

@needs_kernel
@pytest.mark.parametrize('case', MODELS)
@pytest.mark.parametrize('threads', [1, 2, 3])
def test_called_from_eight_threads(case, threads):
    make,size = MODELS[case]
    sparse,xs = make(),[torch.randn(size) for _ in range(8)]
    fresh = copy.deepcopy(sparse)                                            # nothing is derived of its index yet: all threads find that at once
    wants = [forward_and_backward(sparse, x) for x in xs]
    start,results = threading.Barrier(8, timeout=30),[None]*8
    def work(i):
        torch.set_num_threads(threads)
        start.wait()
        results[i] = [forward_and_backward(fresh, xs[(i+j)%8]) for j in range(4)]
    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(8)]
    for w in workers: w.start()
    for w in workers: w.join(60)
    assert not any(w.is_alive() for w in workers)
    for i,some in enumerate(results):
        for j,got in enumerate(some):
            for a,b in zip(got, wants[(i+j)%8]): assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)

class Through(torch.utils.data.Dataset):
    def __init__(self, sparse, x): self.sparse,self.x = sparse,x
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        return torch.cat([t.flatten() for t in forward_and_backward(self.sparse, self.x[i:i+1])])

@needs_kernel
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
@pytest.mark.parametrize('case', MODELS)
@pytest.mark.filterwarnings('ignore')
def test_after_fork(case):
    make,size = MODELS[case]
    sparse,x = make(),torch.randn(size)
    torch.set_num_threads(2)                                                 # a worker has one: after a fork, OpenMP's others are gone for PyTorch, too
    want = torch.stack([Through(sparse, x)[i] for i in range(4)])
    got = next(iter(torch.utils.data.DataLoader(Through(sparse, x[:4]), batch_size=4, num_workers=1, multiprocessing_context='fork', timeout=30)))
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)

# ------------------------------------------------------------ PyTorch
@needs_kernel
@pytest.mark.parametrize('name', OPS)
@pytest.mark.filterwarnings('ignore')
def test_opcheck(name):
    torch.library.opcheck(getattr(ops, name).default, tuple(args_of(name).values()))

def three(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.Flatten(), nn.Linear(96, 10))
def sparse_three():
    torch.manual_seed(0)
    model = three()
    sparsify_model(model, .7)
    dense = copy.deepcopy(model)
    to_sparse_layers(model, least=0.)
    return model,dense

@ways
def test_checkpointing_and_accumulation(way, monkeypatch):
    use(way, monkeypatch)
    (model,dense),x = sparse_three(),torch.randn(2, 3, 9, 9, requires_grad=True)
    for _ in range(2):
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
        dense(x).square().sum().backward()
    for a,b in zip(model, dense):
        if hasattr(a, 'values'): assert torch.allclose(a.values.grad, b.weight.grad[b.weight_mask], rtol=1e-4, atol=1e-4)

@ways
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_another_dtype(way, dtype, monkeypatch):
    use(way, monkeypatch)
    (model,dense),x = sparse_three(),torch.randn(2, 3, 9, 9).to(dtype)
    assert (model.to(dtype)(x)-dense.to(dtype)(x)).norm()<.05*dense(x).norm()

@ways
def test_inference_mode(way, monkeypatch):
    use(way, monkeypatch)
    (model,dense),x = sparse_three(),torch.randn(2, 3, 9, 9)
    with torch.inference_mode(): y = model(x)
    assert torch.allclose(y, dense(x), atol=1e-5)
    model(x).sum().backward()                                                # what has been derived in inference mode serves training
    dense(x).sum().backward()
    assert torch.allclose(model[0].values.grad, dense[0].weight.grad[dense[0].weight_mask], atol=1e-4)

@needs_kernel
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('n_in, bad', [(20, 20), (20, -1), (20, 2**31-1), (0, 0), (1, 1)])
def test_one_example_refuses_a_column_outside(n_in, bad, dtype):
    "Wherever it is: within whole vectors of a row, or in the rest"
    for at in (0, 7, 15, 16, 30):
        col = torch.zeros(31, dtype=torch.int32)
        col[at] = bad
        with pytest.raises(ValueError, match='the index must have'): spmm(torch.tensor([0, 31], dtype=torch.int32), col, torch.ones(31, dtype=dtype), torch.ones(1, n_in, dtype=dtype))

@needs_kernel
@pytest.mark.skipif(shutil.which('cc') is None, reason='no compiler')
def test_calls_can_be_replayed_without_python():
    "What shows that the kernel works on other processors: the C file compiles with a `Python.h` of a few lines, and repeats calls that were written down"
    script = Path(__file__).parents[1]/'benchmarks'/'other_processors.py'
    done = subprocess.run([sys.executable, script, '10', '--cc', 'cc -O0'], capture_output=True, text=True)
    assert done.returncode==0 and 'calls agree' in done.stdout, done.stderr
