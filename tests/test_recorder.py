"The recorder: what it says is what happened, by other means of counting; it disturbs nothing, and goes along with fastai's companions"
import csv, pickle, warnings
from functools import partial
import numpy as np, pytest, torch
from torch import nn
from torch.nn import functional as F
from fastai import optimizer as fo
from fastai.callback import schedule, training
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch.utils.data import TensorDataset
import sparsefast.see.recorder
from sparsefast import presets
from sparsefast.all import *
from sparsefast.memory import remembered
from sparsefast.see.analysis import live_units
from sparsefast.storage import SparseLinear, to_sparse_layers
from sparsefast.see.recorder import SparseRecorderCallback, mask_change
from helpers import *

CATALOGUE = {k.removesuffix('_presets'): v for k,v in vars(presets).items() if k.endswith('_presets')}
def preset_of(name): return {**CATALOGUE[name], 'batches_per_update': 1 if name in ('TopKAST', 'SR_STE', 'Static') else 4, 'replaces_step': False, **({'grad_steps': 4} if name=='SEFT' else {})}

def net(): return nn.Sequential(nn.Linear(8,24), nn.LeakyReLU(.3), nn.Linear(24,20), nn.LeakyReLU(.3), nn.Linear(20,16))
def make(name='SET', cbs=(), record=True, bs=8, sparsity=.5, **kw):
    torch.manual_seed(0)
    learn = learner(net(), opt_func=partial(fo.SGD, mom=.9, wd=.01), bs=bs)
    preset = {**preset_of(name), **kw}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.sparsify(sparsity, preset=preset)
        learn.add_cbs([DynamicSparseTrainingCallback(**preset), *cbs])
    return learn.add_cb(SparseRecorderCallback()) if record else learn

pytestmark = pytest.mark.filterwarnings('ignore')

# ------------------------------------------------------------ it says what happened
class Log(Callback):
    "All masks, after each batch of training"
    run_valid = False
    order = 100
    def __init__(self): self.log = []
    def after_batch(self): self.log.append(masks(self.learn.model))

@pytest.mark.parametrize('name', CATALOGUE)
def test_history(name):
    log = Log()
    learn = make(name, [log])
    start = masks(learn.model)
    learn.fit(4)
    rec,expected,seen,old,n = learn.sparse_recorder, [], [m.clone() for m in start], start, n_params(learn.model)
    for step,new in enumerate(log.log, 1):
        seen = [a | b for a,b in zip(seen, new)]
        if not same_masks(old, new):
            flip,size = sum(int((a^b).sum()) for a,b in zip(old, new)), sum(int(a.sum()+b.sum()) for a,b in zip(old, new))
            dead = sum(int((m.sum(1)==0).sum()) for m in new)
            expected.append((step, flip/size, sum(int(s.sum()) for s in seen)/n, dead, sum(int(m.sum()) for m in new)))
        old = new
    found = [(h['step'], h['churn'], h['explored'], h['dead'], h['nnz']) for h in rec.history]
    assert len(found)==len(expected) and all(f==pytest.approx(e) for f,e in zip(found, expected)) and (found or name=='Static')
    for h in rec.history: assert h['sparsity']==pytest.approx(1-h['nnz']/n) and h['epoch']==(h['step']-1)//10 and 0<=h['drop']<=1
    assert [h['explored'] for h in rec.history]==sorted(h['explored'] for h in rec.history)
    assert not rec.history or rec.history[-1]['layers']==pytest.approx({f'{i}.weight': 1-learn.model[i].weight_mask.float().mean().item() for i in (0, 2, 4)})

def test_mask_change():
    a,b = torch.tensor([1,1,1,0]).bool(), torch.tensor([1,1,0,0]).bool()
    assert mask_change([a, b], [b, a])==dict(dropped=1, grown=1, before=5, after=5, churn=.2) and mask_change([], [])['churn']==0
    assert mask_change([a], [b])['churn']==1/5

def test_expected_exploration():
    "Uniform growth of k weights at each of q updates: 1-(1-d)(1-k/(N(1-d)))^q in the mean (spec: .1, .13, .159, .187, .2141, .2403)"
    torch.manual_seed(0)
    finals = []
    for seed in range(12):
        learn = learner(nn.Linear(40, 25), n_iter=6, opt_func=partial(fo.SGD, mom=.9))
        learn.dls = tensor_dls(6, n_in=40, n_out=25)
        learn.sparsify(.9)
        rec = SparseRecorderCallback()
        learn.fit(1, cbs=[DynamicSparseTrainingCallback(keep_score_f=random_elsewhere_keep, grow_score_f=random_elsewhere, drop_sched_f=constant_anneal, initial_drop_grow_pct=.3, stop_pct=1.,
                                                        batches_per_update=1, replaces_step=False, seed=seed), rec])
        finals.append([h['explored'] for h in rec.history])
    mean = torch.tensor(finals).mean(0).tolist()
    assert mean==pytest.approx([.13, .159, .187, .2141, .2403][:len(mean)], abs=.004) and len(mean)==5

def random_elsewhere_keep(p, generator=None, **kwargs): return torch.rand(p.shape, generator=generator)
random_elsewhere_keep.needs_grad = False

def test_frames():
    log = Log()
    learn = make('RigL', [log], record=False)
    start = masks(learn.model)
    learn.add_cb(rec := SparseRecorderCallback(keep=[0, -1]))
    learn.fit(3)
    for name,i in (('0.weight', 0), ('4.weight', 2)):
        frames = rec.masks(name)
        assert len(frames)==1+len(rec.history) and frames[0][0]==0 and torch.equal(frames[0][1], start[i])
        assert all(torch.equal(mask, log.log[step-1][i]) for step,mask in frames[1:])
    assert len(rec.masks())==len(rec.masks('0.weight'))
    with pytest.raises(ValueError, match='4.weight'): rec.masks('2.weight')
    with pytest.raises(ValueError, match='keep='): SparseRecorderCallback().masks()

# ------------------------------------------------------------ what it costs
class Cost(Callback):
    "Independent: weights that are multiplied in the forward pass, and gradients that are not zero when the optimizer steps, or that wait for the update after it"
    run_valid = False
    order = DynamicSparseTrainingCallback.order+.2
    def __init__(self): self.cost,self.dense = 0,0
    def weights(self): return [m for m in self.learn.model if isinstance(m, nn.Linear)]
    def before_batch(self): self.used = [int(m.weight_mask.sum()) if hasattr(m, 'weight_mask') else m.weight.numel() for m in self.weights()]
    def before_step(self):
        bs = len(self.learn.xb[0])
        self.cost += 2*bs*sum(2*u+int(remembered(m.weight).get('dense', m.weight.grad).count_nonzero()) for u,m in zip(self.used, self.weights()))
        self.dense += 6*bs*sum(m.weight.numel() for m in self.weights())

@pytest.mark.parametrize('name', CATALOGUE)
def test_flops_of_every_preset(name):
    """As the optimizer saw them: `replaces_step=False`, so that gradients are there to be counted at updates too. A little less where a unit is cut off and its gradients
    are zeros (SNFS), a little more where the engine leaves gradients as they are and nothing reads them (GMP)"""
    learn = make(name, [cost := Cost()])
    learn.fit(4)
    rec = learn.sparse_recorder
    if name in ('RigL_avg', 'SEFT'): assert rec.flops>cost.cost                                     # gradients are collected before the optimizer sees them
    elif name=='GSE': assert .97*cost.cost<rec.flops<cost.cost                                      # the ledger counts the positions that are drawn
    else: assert rec.flops==pytest.approx(cost.cost, rel=dict(SNFS=.01, GMP=.03).get(name, 1e-3))
    assert rec.spent()==pytest.approx(rec.flops, rel=1e-9, abs=8) and rec.spent(dense=True)==cost.dense and rec.now['tflops']==rec.flops/1e12

@pytest.mark.parametrize('name', CATALOGUE)
def test_the_ledger_is_that_of_the_flops_room(name):
    "`training_flops`, given the densities before each step, for the presets as published"
    log = Log()
    learn = make(name, [log], **dict(replaces_step=CATALOGUE[name].get('replaces_step', True)) if name!='Static' else {})
    start = masks(learn.model)
    learn.fit(4)
    method = learn.dynamic_sparse_training.timed
    count = count_flops(learn.model, torch.randn(8, 8))
    states = [start, *log.log[:-1]]
    trains = lambda m: min(int(m.sum())+round(method.explore_pct*m.numel()), m.numel())/m.numel()
    ds = [(step, {f'{2*i}.weight': (m.double().mean().item(), trains(m)) for i,m in enumerate(ms)}) for step,ms in enumerate(states, 1)]
    assert learn.sparse_recorder.flops==pytest.approx(training_flops(count, method, 40, ds), rel=1e-9, abs=.5*8)        # of 8 samples; a subset is no whole number

def test_a_dense_layer_costs_all_of_it_and_batches_their_size():
    learn = make('SET', record=False)
    sparsify_model(unsparsify_model(learn.model), .5, exclude=0)
    learn.add_cbs([cost := Cost(), rec := SparseRecorderCallback()])
    learn.dls = tensor_dls(n_iter=3, bs=8)
    learn.dls.train.bs = 7                                                              # 24 examples: 7, 7, 7, 3
    learn.dls.train.drop_last = False
    learn.fit(2)
    assert rec.fits[0]['samples']==48 and rec.fits[0]['step']==8 and rec.flops==pytest.approx(cost.cost, rel=.01)

def test_without_a_method_and_without_masks():
    learn = learner(net())
    learn.fit(2, cbs=(rec := SparseRecorderCallback()))
    assert rec.flops==rec.spent()==rec.spent(dense=True)==20*8*6*(8*24+24*20+20*16) and rec.now['sparsity']==0 and not rec.history
    learn.sparsify(.5)
    learn.fit(2, cbs=(rec := SparseRecorderCallback()))
    assert rec.spent()==pytest.approx(rec.spent(dense=True)/2) and rec.now['sparsity']==.5 and not rec.history

def test_convolutions_and_a_model_with_attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn,self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)
        def forward(self, x): return self.head(self.attn(x[:,None]).mean(1))
    learn = learner(Net())
    learn.sparsify(.5)
    learn.fit(1, cbs=(rec := SparseRecorderCallback()))
    count = count_flops(learn.model, torch.randn(1, 8))
    assert rec.flops==pytest.approx(80*6*count.active_macs, rel=1e-6)

def test_a_model_that_cannot_be_counted_trains_on():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(8, 3)
        def forward(self, x):
            if not self.training and len(x)==1: raise RuntimeError('not one')
            return self.l(x)
    learn = learner(Odd())
    learn.sparsify(.5)
    with pytest.warns(UserWarning, match='not one'): learn.fit(1, cbs=(rec := SparseRecorderCallback()))
    assert rec.flops==0 and rec.now['sparsity']==.5

def pictures(size, n=32):
    x,y = torch.randn(n, 1, size, size), torch.randint(3, (n,))
    return DataLoaders(*(DataLoader(TensorDataset(x, y), bs=8, num_workers=0) for _ in range(2)), device='cpu')

def test_progressive_resizing(monkeypatch):
    "Each fit at the price of its samples; they are counted when their shape is new, and only then"
    counts,count = [], sparsefast.see.recorder.count_flops
    monkeypatch.setattr(sparsefast.see.recorder, 'count_flops', lambda *args: (counts.append(args[1].shape[-1]), count(*args))[1])
    learn = learner(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))
    learn.sparsify(.5)
    learn.add_cb(rec := SparseRecorderCallback())
    expected,dense = 0,0
    for size in (8, 8, 16, 8):
        learn.dls = pictures(size)
        learn.validate()
        learn.fit(2)
        cost = count_flops(learn.model, torch.randn(1, 1, size, size))
        expected,dense = expected+6*64*cost.active_macs, dense+6*64*cost.macs
        assert rec.flops==pytest.approx(expected, rel=1e-9) and rec.spent()==expected and rec.spent(dense=True)==dense
    assert counts==[8, 16, 8]

def test_another_head():
    learn = learner(mlp(8, 24, 3))
    learn.sparsify(.5, exclude='2')
    learn.add_cb(rec := SparseRecorderCallback())
    learn.fit(1)
    learn.model[2] = nn.Sequential(nn.Linear(24, 30), nn.ReLU(), nn.Linear(30, 3))
    learn.create_opt()
    learn.fit(1)
    assert rec.flops==rec.spent()==6*80*(2*96+24*3+24*30+30*3)

def test_another_model():
    "Needs `reset`, and says so; then all is as in a new recorder"
    rec,model = SparseRecorderCallback(),sparse_mlp(.5, (8, 6, 3))
    learner(sparse_mlp(.5)).fit(1, cbs=[DynamicSparseTrainingCallback(**preset_of('RigL')), rec])
    with pytest.raises(ValueError, match=r'0.weight .*\(24, 8\).*\(6, 8\).*reset'): learner(model).fit(1, cbs=rec)
    rec.reset()
    assert rec.count is None and rec.method is None
    learner(model).fit(1, cbs=rec)
    assert rec.flops==rec.spent()==6*80*count_flops(model, torch.randn(1, 8)).active_macs and len(rec.fits)==1

def test_each_fit_has_its_own_method():
    learn = make('RigL')
    learn.fit(2)
    learn.remove_cb(learn.dynamic_sparse_training)
    learn.fit(1)
    rec = learn.sparse_recorder
    assert [f['looks'] for f in rec.fits]==[[[4, 4], [8, 8], [12, 12]], []] and rec.spent()==pytest.approx(rec.flops, rel=1e-9)

def test_a_compiled_model():
    learns = [make('RigL', record=False) for _ in range(2)]
    learns[1].model = torch.compile(learns[1].model, backend='eager')
    recs = [SparseRecorderCallback(keep=0) for _ in range(2)]
    for learn,rec in zip(learns, recs): learn.fit(2, cbs=rec)
    a,b = recs
    assert a.history==b.history and a.history and a.fits==b.fits and a.spent()==b.spent()<a.spent(dense=True) and list(b.frames)==['0.weight'] and list(b.explored)==list(a.explored)
    assert learns[1].sparse_summary().to_dict()==learns[0].sparse_summary().to_dict()

def test_autocast_does_not_hide_the_masks(cpu_amp):
    learn = make('SET').to_fp16()
    learn.fit(2)
    plain = make('SET')
    plain.fit(2)
    assert learn.sparse_recorder.flops==pytest.approx(plain.sparse_recorder.flops, rel=.01)

# ------------------------------------------------------------ layers that store active weights only
class Pictures(nn.Module):
    "Eight numbers as a picture of 2 x 4"
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.LeakyReLU(.3), nn.Conv2d(12, 16, (1,2), stride=(1,2)), nn.LeakyReLU(.3), nn.Flatten(), nn.Linear(64, 16))
    def forward(self, x): return self.body(x.view(-1, 1, 2, 4))

def in_form(form, make_net, name, rec):
    "A training whose layers are masked, sparse, sparse but one, or sparse from the second fit on"
    torch.manual_seed(0)
    learn = learner(make_net().double(), opt_func=partial(fo.SGD, mom=.9, wd=.01))
    learn.dls = DataLoaders(*(DataLoader(TensorDataset(dl.dataset.tensors[0].double(), dl.dataset.tensors[1]), bs=8, num_workers=0) for dl in learn.dls.loaders), device='cpu')
    learn.loss_func = lambda pred, y: F.cross_entropy(pred, y).float()                   # fastai averages losses in single precision
    learn.sparsify(.8, preset=preset_of(name))
    if form in ('sparse', 'but one'): to_sparse_layers(learn, least=0.)
    if form=='but one': learn.model[2] = learn.model[2].to_masked()
    learn.add_cbs([DynamicSparseTrainingCallback(**preset_of(name)), rec])
    learn.fit(2)
    if form=='later': to_sparse_layers(learn, learn.opt, least=0.)
    learn.fit(2)
    return learn

def near(a, b):
    "Equal, numbers but for rounding"
    if isinstance(a, (list, tuple)): return len(a)==len(b) and all(map(near, a, b))
    if isinstance(a, dict): return list(a)==list(b) and all(near(a[k], b[k]) for k in a)
    return a==pytest.approx(b, rel=1e-6) if isinstance(a, float) else a==b

@pytest.mark.parametrize('form', ['sparse', 'but one', 'later', 'pictures'])
@pytest.mark.parametrize('name', ['SET', 'RigL', 'GraNet'])
def test_masked_and_sparse_form_give_one_history(name, form):
    make_net = Pictures if form=='pictures' else net
    recs = [SparseRecorderCallback(keep=[0, -1]) for _ in range(2)]
    learns = [in_form(f, make_net, name, rec) for f,rec in zip(('masked', 'sparse' if form=='pictures' else form), recs)]
    a,b = recs
    names = ['body.0.weight', 'body.2.weight', 'body.5.weight'] if form=='pictures' else ['0.weight', '2.weight', '4.weight']
    assert len(a.history)>4 and near(a.history, b.history) and near(a.fits, b.fits) and near(a.now, b.now) and list(b.explored)==names and b.flops>0
    assert near([list(r) for r in learns[0].recorder.values], [list(r) for r in learns[1].recorder.values])
    assert a.spent()==b.spent() and a.spent(dense=True)==b.spent(dense=True) and all(torch.equal(a.explored[n], b.explored[n]) for n in names)
    assert list(a.frames)==list(b.frames)==names[::2]
    assert all(i==j and torch.equal(m, n) for k in a.frames for (i,m),(j,n) in zip(a.masks(k), b.masks(k), strict=True))

def test_a_sparse_layer_that_dies():
    "Dead outputs and density of a layer whose rows are known"
    layer = nn.Linear(8, 6)
    layer.register_buffer('weight_mask', torch.zeros(6, 8, dtype=torch.bool))
    layer.weight_mask[1:4,:2] = True
    with torch.no_grad(): layer.weight *= layer.weight_mask
    learn = learner(nn.Sequential(SparseLinear.from_masked(layer), nn.ReLU(), nn.Linear(6, 3)))
    learn.fit(1, cbs=(rec := SparseRecorderCallback()))
    assert rec.now['dead']==3 and rec.now['sparsity']==pytest.approx(1-6/48) and rec.nnz=={'0.weight': (6, 48)} and rec.flops==80*6*(6+18)

# ------------------------------------------------------------ it disturbs nothing
@pytest.mark.parametrize('name', ['SET', 'SNFS', 'RigL', 'TopKAST', 'GraNet'])
def test_the_same_training_with_and_without(name):
    a,b = make(name, record=False), make(name)
    for l in (a, b):
        torch.manual_seed(1)
        l.fit_one_cycle(3, .1)
    assert not changed(snapshot(a.model, a.opt), snapshot(b.model, b.opt)) and torch.equal(torch.tensor(a.recorder.losses), torch.tensor(b.recorder.losses))

# ------------------------------------------------------------ fastai's table and companions
NAMES = ['sparsity', 'churn', 'explored', 'dead', 'drop', 'tflops']
def test_columns():
    learn = make('SET', [CSVLogger(fname='sparse.csv')])
    learn.fit(3)
    assert learn.recorder.metric_names[-7:-1]==NAMES and len(learn.recorder.values)==3
    rec,h = learn.sparse_recorder, learn.sparse_recorder.history
    for epoch,row in enumerate(learn.recorder.values):
        last = [x for x in h if x['epoch']<=epoch][-1]
        assert list(row)[-6:-1]==pytest.approx([last[k] for k in NAMES[:-1]])
    assert learn.recorder.values[-1][-1]==rec.flops/1e12 and [r[-1] for r in learn.recorder.values]==sorted(r[-1] for r in learn.recorder.values)
    with open(learn.path/'sparse.csv') as f: rows = list(csv.reader(f))
    assert rows[0][-7:-1]==NAMES and len(rows)==4 and float(rows[1][-7])==pytest.approx(.5)
    assert len(learn.recorder.log)==len(learn.recorder.metric_names)                     # what TensorBoard's and W&B's callbacks zip together

def test_chosen_columns_and_a_metric_to_watch():
    learn = make('SET', record=False)
    learn.fit(2, cbs=[SparseRecorderCallback(columns=['explored']), SaveModelCallback(monitor='explored', comp=np.greater, fname='most')])
    assert learn.recorder.metric_names[-2]=='explored' and 'churn' not in learn.recorder.metric_names
    with pytest.raises(ValueError, match="'churning'"): SparseRecorderCallback(columns=['churning'])

def test_train_metrics_too():
    learn = make('SET')
    learn.recorder.train_metrics = True
    learn.fit(1)
    assert 'train_sparsity' in learn.recorder.metric_names and 'valid_sparsity' in learn.recorder.metric_names and len(learn.recorder.log)==len(learn.recorder.metric_names)

def columns(learn): return {n: [row[i-len(NAMES)] for row in learn.recorder.values] for i,n in enumerate(NAMES)}

@pytest.mark.parametrize('form', ['masked', 'sparse'])
def test_tensorboard(form, tmp_path):
    "All columns arrive, with the picture of the model's graph, and the training is the same"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learns = []
    for cbs in ([TensorBoardCallback(log_dir=str(tmp_path), log_preds=False)], []):
        learns.append(learn := make('RigL', cbs))
        if form=='sparse': to_sparse_layers(learn, least=0.)
        learn.fit(3)
    log = EventAccumulator(str(tmp_path)).Reload()
    for n,values in columns(learns[0]).items(): assert [e.value for e in log.Scalars(n)]==pytest.approx(values) and len(values)==3
    assert log.Tags()['graph']
    assert not changed(*(snapshot(l.model, l.opt) for l in learns)) and learns[0].sparse_recorder.history==learns[1].sparse_recorder.history

def test_a_traced_model_has_its_zeros():
    "TensorBoard traces a model to draw it; the masks are in force while it does"
    learn = make('SET', record=False)
    x = torch.randn(5, 8)
    y = learn.model(x)
    with torch.no_grad(): learn.model[0].weight += 1                                    # past the mask
    traced = torch.jit.trace(learn.model, x)
    assert masked_are_zero(learn.model) and torch.equal(traced(x), learn.model(x)) and not torch.equal(traced(x), y)

def test_wandb(tmp_path, monkeypatch):
    "All columns arrive, without a network"
    wandb = pytest.importorskip('wandb')
    import fastai.callback.wandb as fw
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setattr(fw, 'init_args', lambda o, f=fw.init_args: f(o) if hasattr(o, '__dict__') else {})     # fastai 2.8.12 calls it on numbers too, which fastcore 2.2 refuses
    said,run = [], wandb.init(mode='offline', dir=str(tmp_path), project='sparsefast')
    monkeypatch.setattr(wandb, 'log', lambda d, log=wandb.log, **kw: (said.append(d), log(d, **kw)))
    try:
        learn = make('RigL', [fw.WandbCallback(log_preds=False)])
        learn.fit(3)
        summary = {n: run.summary[n] for n in NAMES}
    finally: run.finish()
    for n,values in columns(learn).items(): assert [d[n] for d in said if n in d]==pytest.approx(values) and summary[n]==pytest.approx(values[-1])

def test_validate_and_get_preds_are_as_ever():
    learn = make('SET')
    before = learn.validate()
    learn.fit(2)
    flops,n = learn.sparse_recorder.flops, len(learn.sparse_recorder.history)
    assert len(learn.validate())==len(before)==1 and len(learn.get_preds()[0])==16 and len(learn.metrics)==0
    assert learn.sparse_recorder.flops==flops and len(learn.sparse_recorder.history)==n

def test_after_a_crash():
    learn = make('SET')
    def crash(learn): raise RuntimeError('bang')
    learn.add_cb(boom := Watch('after_step', crash))
    with pytest.raises(RuntimeError, match='bang'): learn.fit(1)
    learn.remove_cb(boom)
    assert len(learn.validate())==1
    learn.fit(1)
    assert list(learn.recorder.metric_names).count('sparsity')==1 and len(learn.metrics)==0

def test_lr_find():
    learn = make('SET')
    learn.fit(1)
    rec = learn.sparse_recorder
    before = (len(rec.history), rec.flops, len(rec.fits))
    learn.lr_find(num_it=12, show_plot=False)
    assert (len(rec.history), rec.flops, len(rec.fits))==before
    learn.fit(1)
    assert len(rec.fits)==2 and rec.flops>before[1]

def test_fine_tune_is_one_history():
    learn = make('SET', record=False)
    learn.fine_tune(2, freeze_epochs=2, cbs=(rec := SparseRecorderCallback()))
    assert [f['step'] for f in rec.fits]==[20, 20] and {h['fit'] for h in rec.history}=={0, 1}
    steps = [h['step'] for h in rec.history]
    assert steps==sorted(set(steps)) and max(steps)>20 and rec.spent()==pytest.approx(rec.flops, rel=1e-9)
    rec.reset()
    assert not rec.history and not rec.fits and rec.flops==0

def test_start_epoch():
    learn = make('SET')
    learn.fit(4, start_epoch=2)
    rec = learn.sparse_recorder
    assert rec.fits[0]['start']==20 and rec.fits[0]['step']==40 and rec.spent()==pytest.approx(rec.flops, rel=1e-9) and rec.spent(dense=True)==20*8*6*(8*24+24*20+20*16)

@pytest.mark.parametrize('companion', [lambda: training.GradientClip(.1), lambda: schedule.ParamScheduler(dict(lr=schedule.SchedCos(.1, .01)))], ids=['clip', 'schedule'])
def test_companions(companion):
    learn = make('RigL', [companion()])
    learn.fit(3)
    assert learn.sparse_recorder.history and learn.sparse_recorder.spent()==pytest.approx(learn.sparse_recorder.flops, rel=1e-9)

def test_accumulation():
    "Steps are optimizer steps; each costs all its batches"
    learn = make('SET', [training.GradientAccumulation(16), cost := Cost()])
    learn.fit(4)
    rec = learn.sparse_recorder
    assert rec.fits[0]['step']==20 and rec.fits[0]['samples']==320 and all(h['step']%4==0 for h in rec.history) and rec.history
    assert rec.spent()==pytest.approx(rec.flops, rel=1e-9)

def test_export():
    learn = make('SET')
    learn.fit(1)
    cb = pickle.loads(pickle.dumps(learn.sparse_recorder))
    assert cb.history==learn.sparse_recorder.history and cb.metrics_[0].value==cb.now['sparsity']

@pytest.mark.parametrize('name', ['SET', 'RigL', 'RigL_avg', 'SNFS', 'TopKAST'])
def test_a_state_says_what_was_spent(name, tmp_path):
    "In a new recorder, without a learner"
    learn = make(name)
    learn.fit(3)
    old,new = learn.sparse_recorder,SparseRecorderCallback()
    torch.save(old.state_dict(), tmp_path/'state.pth')
    new.load_state_dict(torch.load(tmp_path/'state.pth', weights_only=True))
    assert new.flops==old.flops and new.spent()==old.spent() and new.spent(dense=True)==old.spent(dense=True) and new.history==old.history
    assert new.spent()==pytest.approx(new.flops, rel=1e-9) and SparseRecorderCallback().spent()==0

# ------------------------------------------------------------ stopped and continued
class Stop(Exception): pass
@pytest.mark.parametrize('fit', ['cycle', 'tune'])
@pytest.mark.parametrize('epoch', [0, 1, 2])
def test_resume(fit, epoch, tmp_path):
    def run(folder, cut=None):
        learn = make('RigL', record=False)
        learn.path = tmp_path/folder
        rec = SparseRecorderCallback(keep=0)
        def stop(l):
            rec.cuts = getattr(rec, 'cuts', 0)+1
            if rec.cuts==10*epoch+7: raise Stop('cut')
        cbs = [rec, CheckpointCallback('run'), *([Watch('after_batch', stop)] if cut else [])]
        if fit=='tune': learn.fine_tune(2, freeze_epochs=1, cbs=cbs)
        else: learn.fit_one_cycle(3, .1, cbs=cbs)
        return learn,rec
    whole,a = run('a')
    with pytest.raises(Stop): run('b', cut=True)
    learn,b = run('b')
    assert not changed(snapshot(whole.model, whole.opt), snapshot(learn.model, learn.opt))
    assert a.history==b.history and a.history and a.flops==pytest.approx(b.flops) and a.spent()==b.spent() and a.spent()==pytest.approx(a.flops, rel=1e-9)
    assert all(i==j and torch.equal(m, n) for (i,m),(j,n) in zip(a.masks(), b.masks(), strict=True))
    assert all(list(x)==pytest.approx(list(y)) for x,y in zip(whole.recorder.values, learn.recorder.values))

def test_a_file_of_an_older_version_has_no_callbacks(tmp_path):
    learn = make('SET')
    learn.path = tmp_path
    learn.fit(1, cbs=CheckpointCallback('run'))
    state = torch.load(tmp_path/'models'/'run.pth', weights_only=True)
    assert 'sparse_recorder' in state.pop('callbacks')
    torch.save(state, tmp_path/'models'/'run.pth')
    again = make('SET')
    again.path = tmp_path
    again.fit(1, cbs=CheckpointCallback('run'))
    assert not changed(snapshot(learn.model), snapshot(again.model))

# ------------------------------------------------------------ it looks when something has changed, and only then
@pytest.mark.parametrize('form', ['masked', 'sparse'])
def test_looks_only_at_what_is_new(form, monkeypatch):
    looks,look = [], SparseRecorderCallback._look
    monkeypatch.setattr(SparseRecorderCallback, '_look', lambda self, *args, **kw: (looks.append(len(self.history)), look(self, *args, **kw)))
    learn = make('SET', bs=16, batches_per_update=2)
    if form=='sparse': to_sparse_layers(learn, least=0.)
    learn.fit(3)
    n = len(learn.sparse_recorder.history)
    assert n and len(looks)==1+n
    learn.fit(1)                                                             # nothing has happened since
    assert len(looks)==1+len(learn.sparse_recorder.history)

def test_sees_what_others_do_to_masks_between_epochs():
    class Prune(Callback):
        order = 90
        def after_epoch(self):
            if self.epoch==0: self.learn.model[0].weight_mask[0] = False
    learn = make('Static', [Prune()])
    learn.fit(2)
    dead = columns(learn)['dead']
    assert dead[1]==dead[0]+1

# ------------------------------------------------------------ the mean size of the model in training
@pytest.mark.parametrize('name', ['GMP_lm', 'Chase', 'SET'])
def test_mean_active_share_of_training(name):
    "As counted after every step: over the masked layers, and over all parameters"
    class Count(Callback):
        order = 100
        seen = []
        def before_batch(self):
            if self.training: self.seen.append(sum(int(m.sum()) for *_,m in masked_params(self.learn.model)))
    torch.manual_seed(0)
    learn,rec,count = learner(nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3)), opt_func=partial(fo.SGD, mom=.9)),SparseRecorderCallback(),Count()
    Count.seen = []
    learn.sparsify(.8, preset=CATALOGUE[name])
    learn.fit(3, cbs=[DynamicSparseTrainingCallback(**CATALOGUE[name]), rec, count])
    N,P = sum(m.numel() for *_,m in masked_params(learn.model)),sum(p.numel() for p in learn.model.parameters())
    mean = sum(count.seen)/len(count.seen)
    assert len(count.seen)==30 and mean_active(rec.fits, learn)==(pytest.approx(mean/N), pytest.approx((mean+P-N)/P))
    if name=='SET': assert mean==pytest.approx(.2*N, abs=2)

def test_mean_active_of_nothing():
    assert all(x!=x for x in mean_active([], nn.Linear(2, 2)))

def test_summary_of_a_learner_says_what_is_sparse():
    "A dense model's is fastai's own"
    dls = DataLoaders.from_dsets([(torch.randn(8), torch.tensor(1)) for _ in range(8)], [(torch.randn(8), torch.tensor(1)) for _ in range(8)], bs=4, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), loss_func=nn.CrossEntropyLoss(), cbs=[])
    with learn.no_bar(): dense = learn.summary()
    assert 'Total params: 178' in dense and 'parse' not in dense
    learn.sparsify(.75)
    with learn.no_bar(): sparse = learn.summary()
    assert sparse.startswith(dense) and str(sparse_summary(learn)) in sparse and '0.7500' in sparse
