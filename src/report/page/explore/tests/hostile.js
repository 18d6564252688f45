(async () => {
  const buttons = () => cards().map((card) => card.querySelector('button'));
  const closed = cards().map((card) => card.textContent);
  buttons().forEach((button) => button.click());
  const open = cards().map((card) => card.textContent);
  const replies = cards().map((card) => card.querySelector('blockquote div').textContent);
  const marks = ['<img src=x onerror=alert(1)>', '🦀'].map((text) => {
    search(text);
    return [...document.querySelectorAll('#explore-list mark')].map((mark) => mark.textContent);
  });
  search('script');
  // Images and handlers would have failed by then.
  await sleep(1000);
  finish({
    closed: closed.map((text) => text.slice(0, 2000)),
    open: open.map((text) => text.slice(0, 4000)),
    lengths: replies.map((text) => text.length),
    found: cards().length,
    marks: marks.map((texts) => [texts.length > 4, [...new Set(texts)]]),
    elements: document.querySelectorAll('#explore-app :is(script, img, iframe, style)').length,
    scripts: document.scripts.length,
    links: [...document.querySelectorAll('#explore-app a')].map((link) => link.protocol),
  });
})();
