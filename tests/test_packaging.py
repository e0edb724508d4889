"What a wheel holds and says of itself"
import re, shutil, subprocess, sys
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path
import pytest
pytest.importorskip("setuptools", "77", "setup.py needs setuptools 77 or newer")
import sparsefast

root = Path(__file__).resolve().parents[1]

@pytest.fixture
def project(tmp_path):
    "A copy of what a build needs, without notebooks"
    for f in ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'): shutil.copy(root/f, tmp_path)
    shutil.copytree(root/'sparsefast', tmp_path/'sparsefast', ignore=shutil.ignore_patterns('*.so', '*.pyd', '__pycache__'))
    return tmp_path

def build(project, *args):
    done = subprocess.run([sys.executable, '-W', 'ignore', 'setup.py', '-q', *args], cwd=project, capture_output=True, text=True)
    assert done.returncode==0, done.stderr

def metadata(project):
    build(project, 'egg_info')
    return Parser().parsestr((project/'sparsefast.egg-info'/'PKG-INFO').read_text(encoding='utf-8'))

def test_a_wheel_has_all_modules_and_is_typed(project):
    build(project, 'build_py', '--build-lib', 'out')
    shipped,here = ({p.relative_to(d).as_posix() for p in (d/'sparsefast').rglob('*') if p.suffix in ('.py', '.typed')} for d in (project/'out', project))
    assert 'sparsefast/py.typed' in shipped and shipped==here

def test_an_sdist_has_what_a_build_needs(project):
    build(project, 'egg_info')
    files = (project/'sparsefast.egg-info'/'SOURCES.txt').read_text().split()
    assert {'settings.ini', 'LICENSE', 'sparsefast/py.typed', 'sparsefast/_kernels.c', 'sparsefast/_products.h'} <= {*files}

def test_metadata(project):
    meta = metadata(project)
    kinds = meta.get_all('Classifier')
    assert meta['License-Expression']=='Apache-2.0' and meta['Requires-Python']=='>=3.11' and meta['Version']==sparsefast.__version__
    assert {f'Programming Language :: Python :: 3.{n}' for n in range(11, 15)} < {*kinds} and 'Typing :: Typed' in kinds
    assert not any(k.startswith('License ::') for k in kinds)                              # as the expression has taken their place
    assert {'onnx', 'hf', 'lightning', 'timm', 'notebook', 'docs', 'all'} < {*meta.get_all('Provides-Extra')}

def test_links_come_from_one_setting(project):
    "None while there is no address"
    assert metadata(project).get_all('Project-URL') is None and metadata(project)['Home-page'] is None
    ini = project/'settings.ini'
    ini.write_text(re.sub(r'^repository =$', 'repository = https://example.invalid/sparsefast', ini.read_text(), flags=re.M))
    links = dict(o.split(', ') for o in metadata(project).get_all('Project-URL'))
    assert links['Source']=='https://example.invalid/sparsefast' and links['Changelog']==links['Source']+'/blob/main/CHANGELOG.md'

def test_every_requirement_has_a_minimum_that_ci_installs():
    "The same versions in settings.ini and in the workflow"
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(root/'settings.ini', encoding='utf-8')
    least = dict(o.split('>=') for o in ini['DEFAULT']['requirements'].split())
    tested = dict(re.findall(r'(\w+)==([\d.]+)', (root/'.github/workflows/minimum.yml').read_text()))
    same = lambda a,b: a==b or b==f'{a}.0'
    assert {*least}=={'torch', 'fastai', 'fastcore', 'numpy', 'scipy', 'safetensors'} and all(same(v, tested[k]) for k,v in least.items())

def test_the_commands_exist():
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(root/'settings.ini', encoding='utf-8')
    for line in ini['DEFAULT']['console_scripts'].split('\n'):
        module,name = line.split('=')[1].split(':')
        assert callable(getattr(__import__(module, fromlist=[name]), name))

@pytest.mark.parametrize('f', ['setup.py', 'sparsefast/_kernels.c', 'sparsefast/_products.h'])
def test_licence_lines(f): assert 'SPDX-License-Identifier: Apache-2.0' in (root/f).read_text().splitlines()[0]
