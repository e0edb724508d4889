"fastai's own learners, each with its own data, a few real batches: exact in number, masked weights zero, masks move, predictions work"
import warnings
import numpy as np, pandas as pd, pytest, torch
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, TextDataLoaders, language_model_learner, text_classifier_learner
from fastai.callback.core import Callback
from fastai.vision.all import ImageDataLoaders, PILImage, PILMask, Resize, SegmentationDataLoaders, accuracy, get_image_files, resnet18, unet_learner, vision_learner, xresnet18
from fastai.learner import load_learner
from helpers import masks, masked_are_zero, nnz, n_params, same_masks
from sparsefast.masks import masked_params
from sparsefast.all import *

pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "Two classes of noise, dark and bright, and for each image a picture of two colours as its segmentation"
    top,rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for k,base in (('dark', 0), ('bright', 120)):
        (top/k).mkdir()
        for i in range(12): PILImage.create(rng.integers(base, base+120, (32,32,3), dtype=np.uint8)).save(top/k/f'{i}.png')
    return top

def image_dls(path): return ImageDataLoaders.from_folder(path, valid_pct=.25, seed=0, bs=4, item_tfms=Resize(32), num_workers=0)

def vision(arch): return lambda path: vision_learner(image_dls(path), arch, pretrained=False, metrics=accuracy)

def unet(path):
    dls = SegmentationDataLoaders.from_label_func(path, get_image_files(path), lambda f: PILMask.create((np.array(PILImage.create(f)).mean(2)>100).astype(np.uint8)), codes=['low','high'],
                                                  bs=4, valid_pct=.25, seed=0, num_workers=0)
    return unet_learner(dls, resnet18, pretrained=False, cut=6)                              # two of its four stages

words = pd.DataFrame(dict(text=[f"{'good great fine' if i%2 else 'bad poor dull'} film number {i%5} with many words about it" for i in range(60)], label=[str(i%2) for i in range(60)], is_valid=[i%5==0 for i in range(60)]))
def texts(path, **kw): return TextDataLoaders.from_df(words, path=path, text_col='text', label_col='label', valid_col='is_valid', bs=8, seq_len=12, **kw)

small = dict(emb_sz=12, n_hid=16, n_layers=2, pad_token=1, bidir=False, output_p=.1, hidden_p=.1, input_p=.1, embed_p=.1, weight_p=.1)
def classifier(path): return text_classifier_learner(texts(path), AWD_LSTM, config=small, pretrained=False)
def language_model(path): return language_model_learner(texts(path, is_lm=True), AWD_LSTM, config={**small, 'tie_weights': True, 'out_bias': True}, pretrained=False)

def tabular(path):
    df = pd.DataFrame(dict(a=list('xyz')*30, b=np.random.default_rng(0).normal(size=90), y=['n','p']*45))
    return tabular_learner(TabularDataLoaders.from_df(df, path=path, procs=[Categorify, FillMissing, Normalize], cat_names=['a'], cont_names=['b'], y_names='y', valid_idx=list(range(20)), bs=8), layers=[32,16])

def collab(path):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=rng.integers(9, size=90), item=rng.integers(9, size=90), rating=rng.integers(1, 6, size=90)))
    return collab_learner(CollabDataLoaders.from_df(df, path=path, bs=8, seed=0), use_nn=True, layers=[32,16], y_range=(0,6))

LEARNERS = dict(resnet=vision(resnet18), xresnet=vision(xresnet18), timm=vision('convnextv2_atto'), mobilenet=vision('mobilenetv3_small_050'), unet=unet, classifier=classifier, language_model=language_model,
                tabular=tabular, collab=collab)

@pytest.mark.parametrize('preset', [RigL_presets, SNFS_presets], ids=['RigL', 'SNFS'])
@pytest.mark.parametrize('name', LEARNERS)
def test_learner(name, preset, images):
    if name in ('timm', 'mobilenet'): pytest.importorskip('timm')
    torch.manual_seed(0)
    learn = LEARNERS[name](images)
    learn.sparsify(.8, sparse_f=erdos_renyi_sparsity)
    before,first = sum(nnz(learn.model)),masks(learn.model)
    sizes = [(w.p.numel(), int(getattr(w.module, f'{w.name}_mask', torch.ones_like(w.p)).sum())) for w in weights_of(learn.model)]
    assert sum(a for _,a in sizes)==pytest.approx(.2*sum(n for n,_ in sizes), abs=len(sizes))
    learn.fit(2, 1e-3, cbs=[DynamicSparseTrainingCallback(**{**preset, 'batches_per_update': 2, 'replaces_step': False}), StepsExact(before)])
    used = [p.grad is not None for p,*_ in sparse_params(learn.model)]                         # fastai leaves out the last convolution of timm's mobile nets
    assert all(not torch.equal(a, b) for a,b,u in zip(first, masks(learn.model), used) if u and a.sum()>6) and sum(used)>=len(used)-1
    assert masked_are_zero(learn.model) and torch.isfinite(torch.tensor(learn.validate()[0]))

def weights_of(model):
    "Those that count, each once: no depthwise ones"
    return {w.p: w for w in weight_names(model) if not 1<getattr(w.module, 'groups', 1)==getattr(w.module, 'in_channels', 0)}.values()

class StepsExact(Callback):
    "After each step: as many weights as before, and none where there should be none"
    order = 70
    def __init__(self, n): self.n = n
    def after_step(self): assert sum(nnz(self.learn.model))==self.n and masked_are_zero(self.learn.model)

@pytest.mark.parametrize('name', ['xresnet', 'classifier', 'tabular', 'collab'])
def test_export_and_load(name, images, tmp_path):
    "What `learn.export` writes is the same model, with masks and hooks; it predicts alike, and trains on"
    torch.manual_seed(0)
    learn = LEARNERS[name](images)
    learn.sparsify(.8)
    learn.add_cb(DynamicSparseTrainingCallback(RigL(update_every=2)))
    learn.fit(1, 1e-3, cbs=[SparseRecorderCallback(), CheckpointCallback(str(tmp_path/'run'))])
    before = learn.get_preds()[0]
    learn.export(tmp_path/'model.pkl')
    loaded = load_learner(tmp_path/'model.pkl')
    assert same_masks(masks(loaded.model), masks(learn.model)) and loaded.dynamic_sparse_training.method==learn.dynamic_sparse_training.method
    with torch.no_grad():
        for _,_,p,mask in masked_params(loaded.model): p[~mask] = 9.                           # hooks mask before the next use
    assert torch.equal(loaded.get_preds(dl=learn.dls.valid)[0], before) and masked_are_zero(loaded.model)
    was = masks(learn.model)
    for l in (learn, loaded):
        l.dls = LEARNERS[name](images).dls
        l.fit(2, 1e-3)
        assert masked_are_zero(l.model) and not same_masks(was, masks(l.model))
