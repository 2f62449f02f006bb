"""Every text of the page has its room: at all widths, in both languages, in a wide and a narrow font."""

from __future__ import annotations

import itertools

import pytest
from page_stages import STAGES, Stages
from page_support import LANGS

WIDTHS = (320, 360, 390, 768, 1024, 1280, 1366, 1440, 1920, 2560)
FONTS = ("DejaVu Sans", "Liberation Sans")
# Sets the font before the page measures with it, and notes what is written on a canvas.
INK = """
document.addEventListener('readystatechange', () =>
  document.documentElement.style.setProperty('--font', '%s'));
const {fillText, clearRect} = CanvasRenderingContext2D.prototype;
CanvasRenderingContext2D.prototype.clearRect = function (...all) {
  this.canvas.inked = [];
  clearRect.apply(this, all);
};
CanvasRenderingContext2D.prototype.fillText = function (text, x, y, most = Infinity) {
  const wide = Math.min(most, this.measureText(text).width);
  const left = x - wide * ({center: .5, right: 1, end: 1}[this.textAlign] ?? 0);
  (this.canvas.inked ??= []).push([text, left, left + wide, y]);
  fillText.apply(this, arguments);
};
"""
# Returns what does not fit: [fault, where, text]. A text counts where its letters are, not where its line is high.
MISFITS = """
const [width, done] = arguments;
const until = performance.now() + 4000;
const canvases = [...document.querySelectorAll('canvas')];
const isDrawn = (c) => !c.clientWidth || Math.abs(c.width / devicePixelRatio - c.clientWidth) < 1;
const look = () => {
  const waits = innerWidth !== width || !canvases.every(isDrawn);
  if (waits && performance.now() < until) return requestAnimationFrame(look);
  requestAnimationFrame(() => setTimeout(() => done(misfits())));
};
look();

function misfits() {
  const found = [], texts = [];
  const path = (e) => {
    const steps = [];
    for (; e && e !== document.body; e = e.parentElement) {
      steps.unshift(e.id ? `#${e.id}` : e.localName + (e.className ? `.${[...e.classList].join('.')}` : ''));
      if (e.id) break;
    }
    return steps.slice(0, 1).concat(steps.slice(1).slice(-2)).join(' ');
  };
  const fault = (what, e, text) => found.push([what, path(e), text.trim().slice(0, 60)]);
  const pen = document.createElement('canvas').getContext('2d');
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const styles = new Map();
  const styleOf = (e) => styles.get(e) ?? styles.set(e, getComputedStyle(e)).get(e);
  const clipsOf = (e) => {  // the boxes that cut what is in them
    const boxes = [];
    for (; e !== document.body; e = e.parentElement) {
      const {overflowX, overflowY} = styleOf(e);
      if (overflowX !== 'visible') boxes.push([e.getBoundingClientRect(), /auto|scroll/.test(overflowY)]);
    }
    return boxes;
  };
  while (walker.nextNode()) {
    const node = walker.currentNode, e = node.parentElement;
    if (!node.data.trim() || e.closest('script, style, option, .vh, .skip') || !e.checkVisibility()) continue;
    if (styleOf(e).clipPath !== 'none' || styleOf(e).transform !== 'none') continue;
    const range = document.createRange(), clips = clipsOf(e), mid = e.closest('.cut, .bad[title]');
    range.selectNodeContents(node);
    // It may be cut that shows its tail and tells all of itself.
    const ends = mid && (mid.matches('.bad') || e !== mid.lastElementChild);
    const may = ends && mid.title.includes(mid.textContent.trim());
    for (const box of range.getClientRects()) {
      const top = box.top + box.height * .3, bottom = box.bottom - box.height * .25;
      const rect = {node, e, top, bottom, left: box.left, right: box.right, text: node.data};
      for (const [edge, scrolls] of clips) {
        const cut = box.right > edge.right + 1 || box.left < edge.left - 1 || (!scrolls && bottom > edge.bottom + 1);
        if (cut && !may && box.width) fault('cut', e, node.data);
        rect.left = Math.max(rect.left, edge.left);
        rect.right = Math.min(rect.right, edge.right);
        rect.bottom = Math.min(rect.bottom, edge.bottom);
        rect.top = Math.max(rect.top, edge.top);
      }
      if (rect.right <= rect.left || rect.bottom <= rect.top) continue;
      if (rect.left < -1 || rect.right > innerWidth + 1) fault('out of the window', e, node.data);
      texts.push(rect);
    }
  }
  for (const e of document.querySelectorAll('select, input')) {
    if (!e.checkVisibility() || e.type === 'checkbox') continue;
    const style = getComputedStyle(e);
    pen.font = style.font;
    const text = e.selectedOptions?.[0]?.textContent ?? (e.value || e.placeholder);
    const room = e.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const arrow = e.localName === 'select' && style.appearance !== 'none' ? 18 : 0;
    if (e.type !== 'date' && pen.measureText(text).width > room - arrow + 1 && !e.title.includes(text))
      fault('cut', e, text);
    const box = e.getBoundingClientRect();
    if (box.left < -1 || box.right > innerWidth + 1) fault('out of the window', e, text);
  }
  for (const canvas of document.querySelectorAll('canvas')) {
    const box = canvas.getBoundingClientRect();
    for (const [text, left, right, y] of box.width ? canvas.inked ?? [] : []) {
      if (left < -1 || right > box.width + 1) fault('cut', canvas, text);
      texts.push({node: text, e: canvas, text, left: box.left + left, right: box.left + right,
                  top: box.top + y - 3, bottom: box.top + y + 3});
    }
  }
  texts.sort((a, b) => a.top - b.top);
  texts.forEach((a, at) => {
    for (let i = at + 1; i < texts.length && texts[i].top < a.bottom; i += 1) {
      const b = texts[i];
      if (a.node !== b.node && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1)
        fault('overlap', a.e, `${a.text.trim().slice(0, 28)} / ${b.text.trim().slice(0, 28)}`);
    }
  });
  const sideways = document.documentElement.scrollWidth - innerWidth;
  if (sideways > 0) found.push(['sideways', 'html', String(sideways)]);
  return found;
}
"""


@pytest.mark.fonts
def test_nothing_is_cut_or_covered_or_outside(browser, tmp_path):
    found = {}
    with Stages(browser, tmp_path) as stages:
        for font, stage in itertools.product(FONTS, STAGES[:4]):
            browser.resize(1440, 900, 1)
            with browser.before_load(INK % font):
                page = stages.show(stage)
            langs = LANGS[:1] if stage == "masked" else LANGS  # what it hides has no language
            for lang, width in itertools.product(langs, WIDTHS):
                if width == WIDTHS[0]:
                    page.speak(lang)
                browser.resize(width, 900)
                for what, where, text in browser.run_async(MISFITS, width):
                    found.setdefault((what, where), {}).setdefault(f"{stage}, {lang}, {font[0]}, {width}", text)
        stages.page.check()
    told = [f"{what} in {len(views)} views: {where}: {[*views.items()][:2]}" for (what, where), views in found.items()]
    assert told == []
