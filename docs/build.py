"""The whole site from stored outputs, into `_docs/html`: `python docs/build.py`

Pages (pages.py), Sphinx with warnings as errors, then every link and anchor inside the site is looked up. Needs the extra `docs`; no network."""
import re, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from pages import build, root
from sphinx.cmd.build import main

class Page(HTMLParser):
    "A page's link targets, and the links it has"
    def __init__(self, fn):
        super().__init__()
        self.ids,self.links = {''},[]
        self.feed(fn.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        self.links += [a[k] for k in ('href', 'src') if a.get(k)]

def broken(out):
    "Links inside the site that lead nowhere"
    pages = {p.resolve(): Page(p) for p in out.rglob('*.html')}
    for fn,page in pages.items():
        for link in page.links:
            if re.match(r'[a-z]+:|//', link): continue
            path,_,frag = link.partition('#')
            path = unquote(path.partition('?')[0])
            to = (fn.parent/path).resolve() if path else fn
            if not to.exists() or to.suffix=='.html' and unquote(frag) not in pages[to].ids: yield f'{fn.relative_to(out.resolve())}: {link}'

if __name__=='__main__':
    src,out = root/'_proc'/'pages',root/'_docs'/'html'
    build(src)
    rc = main(['-W', '--keep-going', '-E', '-q', '-c', str(Path(__file__).parent), str(src), str(out)])
    bad = sorted(set(broken(out)))
    for o in bad: print('leads nowhere:', o)
    sys.exit(rc or bool(bad))
