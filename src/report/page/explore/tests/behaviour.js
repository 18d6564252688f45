(async () => {
  const seen = {};
  const counted = () => part('count').textContent;
  seen.start = [counted(), cards().length, part('more').textContent, part('reset').hidden];
  seen.conditions = [...select('condition').options].map((option) => option.value);
  seen.doses = [...select('dose').options].map((option) => option.value);
  seen.first = cards().slice(0, 6).map((card) => card.className);

  seen.counts = STEPS.map(({ query, chosen }) => {
    part('reset').click();
    for (const [name, value] of Object.entries(chosen)) choose(name, value);
    search(query);
    return [counted(), part('rates').textContent];
  });
  part('reset').click();

  search('NOTICE');
  const marks = [...document.querySelectorAll('#explore-list mark')];
  const same = (mark) => mark.textContent.toLowerCase() === 'notice';
  seen.marks = [marks.length > 50, marks.every(same)];
  search('');

  part('more').click();
  seen.more = [cards().length, document.activeElement === cards()[50].querySelector('button')];

  const opened = (condition) => {
    choose('condition', condition);
    const toggle = cards()[0].querySelector('button');
    toggle.focus();
    toggle.click();
    const text = (selector) => cards()[0].querySelector(selector)?.textContent ?? null;
    const state = [toggle.getAttribute('aria-expanded'), document.activeElement === toggle,
      text('blockquote > .in'), text('blockquote > .window'), text('blockquote div .in') !== null,
      cards()[0].querySelectorAll('li').length];
    const [, evidence] = cards()[0].querySelector('li').childNodes;
    toggle.click();
    const closed = [toggle.getAttribute('aria-expanded'), text('blockquote > .in')];
    return [...state, evidence.data === ' ', ...closed];
  };
  choose('prompt', 'sampled / cued');
  seen.opened = [opened('concept'), opened('clean')];
  part('reset').click();

  choose('condition', 'clean');
  search('a b');
  await sleep(500);
  seen.saved = location.hash;
  location.hash = '#transcripts';
  await sleep(500);
  seen.elsewhere = [counted(), location.hash];
  part('reset').click();
  await sleep(500);
  seen.reset = location.hash;
  location.hash = '#explore?condition=clean&dose=none&q=';
  await sleep(500);
  seen.loaded = [counted(), select('condition').value, select('dose').value];
  part('reset').click();
  await sleep(500);
  seen.end = location.hash;

  choose('prompt', 'sampled / cued');
  const dots = [...part('picture').querySelectorAll('g')];
  seen.titles = dots.map((dot) => dot.querySelector('title').textContent);
  dots[2].dispatchEvent(new Event('click'));
  seen.chosen = [select('concept').value, part('picture').querySelectorAll('g:not(.faint)').length];
  finish(seen);
})();
