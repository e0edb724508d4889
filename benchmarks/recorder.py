"""What the recorder costs: the same training with `SparseRecorderCallback` and without.

    python benchmarks/recorder.py                    # runs what recorder.jsonl lacks, then prints the table
    python benchmarks/recorder.py --only REGEX       # those whose name, as printed, matches
    python benchmarks/recorder.py --again            # measures also what is there already; of equal names the last counts
    python benchmarks/recorder.py --table            # only prints

fastai's loop on one thread, 90 % sparse, RigL. The variants take turns, in random order each round, and a round is one epoch; what counts is the ratio to the epoch without a recorder of the same round: the median over the rounds, with the quartiles.
`without again` is a twin of the first: what differs from 1 there is the noise. Because the cost is smaller than that, it is also measured from inside: `share` is the part of an epoch's time that passes in the recorder's own events. `count_ms` is what happens once,
on the first batch: counting FLOPs. With `every=100` each epoch of 150 batches has one update, at its hundredth step, as in RigL's preset; with `never` there is none; the larger networks have theirs sooner, so that an epoch has one."""
import re, time, warnings
from statistics import median, quantiles
import torch
from torch import nn
from fastai.basics import DataLoaders, Learner, SGD
from fastai.callback.progress import ProgressCallback
from fastcore.basics import noop
from sparsefast.all import *
from sparsefast.see.recorder import SparseRecorderCallback
from sparsefast.schedules import constant_anneal
from masking import dl, made, markdown, ratios, rounds, works
from records import Records, hardware, parser

records = Records(__file__)

class Timed(SparseRecorderCallback):
    "A recorder that adds up the seconds of its own events"
    seconds = 0.
    def __call__(self, event_name):
        start = time.perf_counter()
        try: return super().__call__(event_name)
        finally: self.seconds += time.perf_counter()-start

def epochs(name, every, n_batches, n, storage='masked', keep=None):
    "Epochs of `n_batches` batches, without and with a recorder"
    _,bs,shape,_ = works[name]
    b,shares = (torch.randn(bs, *shape), torch.randint(10, (bs,))), []
    def trainer(rec):
        method = DynamicSparseTrainingCallback(**{**RigL_presets, 'batches_per_update': every, 'stop_pct': 1., 'drop_sched_f': constant_anneal})
        learn = Learner(DataLoaders(dl(b, n_batches), dl(b, 1)), made(name, True), loss_func=nn.CrossEntropyLoss(), lr=1e-3, opt_func=SGD, cbs=[method, *([rec] if rec else [])])
        if storage=='sparse': to_sparse_layers(learn, least=0.)
        learn.logger = noop
        learn.remove_cb(ProgressCallback)
        def epoch():
            start,before = time.perf_counter(), rec and rec.seconds
            with learn.no_bar(): learn.fit(1)
            if rec: shares.append((rec.seconds-before)/(time.perf_counter()-start))
        return epoch
    rec = Timed(keep=keep)
    res = ratios(rounds({'without': trainer(None), 'with': trainer(rec), 'without again': trainer(None)}, n, warm=1), base='without')
    start,rec.count = time.perf_counter(), None
    rec.learn.xb = b[:1]
    rec._count()
    q = quantiles(shares[1:], n=4)                                           # the first epoch warms up
    return {**res, 'batches': n_batches, 'updates': len(rec.history)//(n+1), 'count_ms': round(1000*(time.perf_counter()-start), 1), 'share': dict(median=median(shares[1:]), low=q[0], high=q[2])}

def plan():
    "All measurements: (name, function, arguments)"
    yield 'MLP never', ('MLP', 10**6, 150, 8)
    yield 'MLP every=100', ('MLP', 100, 150, 8)
    yield 'MLP every=100 sparse', ('MLP', 100, 150, 20, 'sparse')
    yield 'MLP every=100 keep', ('MLP', 100, 150, 8, 'masked', 0)
    yield 'ResNet-18 every=20', ('ResNet-18', 20, 30, 4)
    yield 'transformer every=8', ('transformer', 8, 12, 3)

done = records.done

def table():
    "With to without a recorder, without to without, and the recorder's own share"
    rows = []
    for name,_ in plan():
        if (r := done().get(name)) is None: continue
        both = [f"{v['ratio']:.3f} ({v['low']:.3f}-{v['high']:.3f})" for v in (r['variants'][k] for k in ('with', 'without again'))]
        rows.append([name, f"{r['ms']/r['batches']:.1f} ms", f"{r['updates']} in {r['batches']}", *both, f"{100*r['share']['median']:.2f} % ({100*r['share']['low']:.2f}-{100*r['share']['high']:.2f})", f"{r['count_ms']:.0f} ms"])
    return markdown(['training', 'step', 'updates', 'with / without', 'without / without', "in the recorder's events", 'once'], rows)

def sentence():
    "The cost in words"
    got = done()
    part = lambda k: f"{100*got[k]['share']['median']:.1f} %"
    r = got['MLP every=100']
    return (f"In epochs of {r['batches']} batches, on one thread of an {r['cpu']}, the recorder's events take {part('MLP never')} of the time of a perceptron's training without an update, {part('MLP every=100')} with one in each, and {part('MLP every=100 sparse')} where layers store active weights only and a step takes a third of the time; "
            f"the whole training takes {r['variants']['with']['ratio']:.3f} times as long as without a recorder (quartiles {r['variants']['with']['low']:.3f} to {r['variants']['with']['high']:.3f}), "
            f"and a twin without a recorder {r['variants']['without again']['ratio']:.3f} times ({r['variants']['without again']['low']:.3f} to {r['variants']['without again']['high']:.3f}).")

def main():
    ap = parser(__doc__, 'measurements')
    ap.add_argument('--again', action='store_true', help='measure what is there already, too')
    ap.add_argument('--seconds', type=float, default=float('inf'), help='begin no measurement after so many seconds')
    args,start = ap.parse_args(), time.perf_counter()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    for name,arg in [] if args.table else plan():
        if not re.search(args.only, name) or name in done() and not args.again or time.perf_counter()-start>args.seconds: continue
        print(records.add(dict(name=name, **epochs(*arg), **hardware())), flush=True)
    print(table())

if __name__=='__main__': main()
