'use strict';
// Search and filters over the replies. What a model or a file wrote gets into the page as text
// nodes and values of attributes alone.
(() => {
  const PAGE = 50; // cards drawn at once
  const CLIP = 900; // characters of a reply in a closed card
  const MARKS = 200; // marked matches in a text
  const HASH = '#explore?';

  const byId = (id) => document.getElementById(`explore-${id}`);
  const data = JSON.parse(byId('data').textContent);
  const { strings, verdicts } = data;
  const rows = data.id.map((_, row) => row);
  const repeated = data.repeat.some((repeat) => repeat > 0);
  const search = byId('search');
  let query = ''; // folded
  let folded = null; // all the strings, from the first search on
  let shown = []; // rows that pass
  let drawn = 0; // how many of them have a card
  let timer = 0;

  const maker = (space) => (tag, attributes, ...children) => {
    const element = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const html = maker('http://www.w3.org/1999/xhtml');
  const svg = maker('http://www.w3.org/2000/svg');
  const spaced = (name) => name.replaceAll('_', ' ');
  const thousands = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, '\u202f');
  const alphabetical = (a, b) => a.localeCompare(b, 'en');

  // Lower case at the same length, so that a match's place holds in the text itself.
  function fold(text) {
    const lower = text.toLowerCase();
    if (lower.length === text.length) return lower;
    const same = (c) => (c.toLowerCase().length === c.length ? c.toLowerCase() : c);
    return Array.from(text, same).join('');
  }

  // Filters: a select each, whose options are values of one of the rows' columns.

  const distinct = (column, none) => [...new Set(column)].filter((value) => value !== none);
  const texts = (column) => distinct(column, 0).map((place) => [place, strings[place]]);
  const named = (column) => texts(column).sort((a, b) => alphabetical(a[1], b[1]));
  const numbers = (column) =>
    distinct(column, null).sort((a, b) => a - b).map((value) => [value, String(value)]);
  const signs = (column) => [['1', 'yes'], ['0', 'no']].filter(([sign]) => column.includes(sign));

  const filters = [
    ['prompt', data.prompt, named],
    // Their places are in canonical order.
    ['condition', data.condition, (column) => texts(column).sort((a, b) => a[0] - b[0])],
    ['layer', data.layer, numbers],
    ['dose', data.dose, numbers],
    ['concept', data.concept, named],
    ...verdicts.map(({ name, answers }) => [name, answers, signs]),
    ['success', data.success, signs],
  ].flatMap(([name, column, list]) => {
    const options = list(column);
    if (options.length === 0) return [];
    const option = (value, label) => html('option', { value }, label);
    const select = html('select', { autocomplete: 'off' }, option('', 'any'),
      ...options.map(([, label]) => option(label, label)));
    select.addEventListener('change', update);
    byId('filters').append(html('label', {}, spaced(name), select));
    return [{ name, column, select, wanted: () => options[select.selectedIndex - 1]?.[0] }];
  });

  const passes = (row, active) => active.every(({ column, value }) => column[row] === value);

  // Tells of a row whether the query stands in one of its texts or is its id.
  function finder() {
    if (!query) return () => true;
    folded ??= strings.map(fold);
    const hits = folded.map((text) => text.includes(query));
    const columns = [data.text, data.concept, data.other, data.sentence];
    columns.push(...verdicts.map(({ evidence }) => evidence));
    return (row) => columns.some((column) => hits[column[row]]) || fold(data.id[row]) === query;
  }

  function update() {
    query = fold(search.value.trim());
    const active = filters.map((filter) => ({ ...filter, value: filter.wanted() }))
      .filter(({ value }) => value !== undefined);
    const found = finder();
    shown = rows.filter((row) => passes(row, active) && found(row));
    byId('count').textContent = `${thousands(shown.length)} of ${thousands(rows.length)} replies`;
    byId('reset').hidden = !query && active.length === 0;
    drawDots(active, found);
    drawn = 0;
    byId('list').replaceChildren();
    more();
    clearTimeout(timer);
    timer = setTimeout(save, 400, active);
  }

  function more() {
    const cards = shown.slice(drawn, drawn + PAGE).map(card);
    byId('list').append(...cards);
    drawn += cards.length;
    const next = Math.min(PAGE, shown.length - drawn);
    byId('more').hidden = next === 0;
    byId('more').textContent = `Show ${next} more`;
    return cards[0];
  }

  // The text's nodes, the query's matches marked.
  function marked(text) {
    if (!query) return [text];
    const [nodes, lower] = [[], fold(text)];
    let from = 0;
    let at = lower.indexOf(query);
    while (at >= 0 && nodes.length < 2 * MARKS) {
      nodes.push(text.slice(from, at), html('mark', {}, text.slice(at, at + query.length)));
      from = at + query.length;
      at = lower.indexOf(query, from);
    }
    return [...nodes, text.slice(from)];
  }

  // A long text's beginning, or what surrounds its first match.
  function excerpt(text) {
    if (text.length <= CLIP) return marked(text);
    const at = query ? fold(text).indexOf(query) : 0;
    const from = at + query.length > CLIP ? Math.max(0, at - CLIP / 3) : 0;
    const to = from + CLIP;
    return [from > 0 ? '…' : '', ...marked(text.slice(from, to)), to < text.length ? '…' : ''];
  }

  function reply(row, nodes) {
    const text = strings[data.text[row]];
    if (!text) return [html('small', {}, '(empty)')];
    return data.cut[row] === '1' ? [...nodes(text), ' ', html('small', {}, '[cut]')] : nodes(text);
  }

  // What made the reply, as nodes.
  function facts(row) {
    const condition = strings[data.condition[row]];
    const quoted = (place, before = '') =>
      (place ? [` · ${before}“`, ...marked(strings[place]), '”'] : []);
    const [layer, dose] = [data.layer[row], data.dose[row]];
    return [
      html('b', {}, condition),
      ...quoted(data.other[row]),
      ...quoted(data.concept[row], condition === 'concept' ? '' : 'for '),
      ...quoted(data.sentence[row]),
      layer === null ? '' : ` · L${layer}`,
      dose === null ? '' : ` · dose\u00a0${dose}`,
      repeated ? ` · repeat\u00a0${data.repeat[row] + 1}` : '',
      ` · ${strings[data.prompt[row]]}`,
    ];
  }

  // The verdicts as signs; in an open card, or where the query stands in it, with the evidence.
  function judged(row, open) {
    const items = verdicts.filter(({ answers }) => answers[row] !== '-').map((verdict) => {
      const yes = verdict.answers[row] === '1';
      const sign = html('b', {}, `${yes ? '✓' : '✗'} ${spaced(verdict.name)}`);
      const nodes = marked(strings[verdict.evidence[row]]);
      const evidence = open || nodes.length > 1 ? [' ', ...nodes] : [];
      return html('li', { class: yes ? 'yes' : 'no' }, sign, ...evidence);
    });
    if (items.length === 0) items.push(html('li', {}, 'no verdict yet'));
    if (items.length > 1 && data.success[row] === '1') {
      items.push(html('li', { class: 'yes' }, html('b', {}, '✓ success')));
    }
    return html('ul', { class: open ? '' : 'chips' }, ...items);
  }

  // The end of the prompt, the window in place, and the reply.
  function transcript(row) {
    const [before, window, after, through] = data.contexts[data.context[row]] ?? [0, 0, 0, false];
    const clean = strings[data.condition[row]] === 'clean';
    const inside = clean ? 'window' : 'in';
    const text = html('blockquote', { tabindex: 0, role: 'region', 'aria-label': 'Transcript' },
      strings[before], html('span', { class: inside }, strings[window]), strings[after],
      html('div', {}, html('span', { class: through ? inside : '' }, ...reply(row, marked))));
    const key = clean ? 'the window, nothing injected' : 'injected';
    const keys = window || through ? [html('span', { class: inside }, key), ' · '] : [];
    const id = data.id[row];
    const link = html('a', { href: HASH + new URLSearchParams({ q: id }) }, id);
    return [text, html('p', { class: 'note' }, ...keys, 'trial ', link)];
  }

  function card(row) {
    const toggle = html('button', { type: 'button' }, ...facts(row));
    const header = html('header', { title: `trial ${data.id[row]}` }, toggle);
    const body = html('div', {});
    const kind = `reply ${strings[data.condition[row]]}`;
    const article = html('article', { class: kind }, header, body);
    const draw = (open) => {
      toggle.setAttribute('aria-expanded', open);
      article.classList.toggle('open', open);
      const text = open ? transcript(row) : [html('blockquote', {}, ...reply(row, excerpt))];
      body.replaceChildren(...text, judged(row, open));
    };
    toggle.addEventListener('click', () => draw(!article.classList.contains('open')));
    draw(false);
    return article;
  }

  // One dot for each concept: how often its vector's replies succeed, and clean ones. It is one
  // prompt's replies, since prompts ask for different things.

  // Of each prompt's place the filter on what is counted: success, else the first verdict.
  const outcomes = new Map(named(data.prompt).flatMap(([prompt]) => {
    const own = rows.filter((row) => data.prompt[row] === prompt);
    const outcome = ['success', ...verdicts.map((verdict) => verdict.name)]
      .map((name) => filters.find((filter) => filter.name === name))
      .find((filter) => filter && own.some((row) => filter.column[row] !== '-'));
    return outcome ? [[prompt, outcome]] : [];
  }));

  // (concept, [yes, of, clean yes, of clean]), the largest share first. Filters on what is counted
  // or compared are left aside; clean replies have no layer and no dose.
  function tally(prompt, outcome, active, found) {
    const sums = new Map();
    const count = (condition, at, ...aside) => {
      aside.push('condition', 'concept', outcome.name);
      const own = active.filter(({ name }) => !aside.includes(name));
      for (const row of rows) {
        const answer = outcome.column[row];
        if (data.prompt[row] !== prompt || strings[data.condition[row]] !== condition) continue;
        if (answer === '-' || !passes(row, own) || !found(row)) continue;
        const sum = sums.get(data.concept[row]) ?? [0, 0, 0, 0];
        sums.set(data.concept[row], sum);
        sum[at] += Number(answer);
        sum[at + 1] += 1;
      }
    };
    count('concept', 0);
    count('clean', 2, 'layer', 'dose');
    return [...sums].filter(([, sum]) => sum[1] > 0).sort(([a, x], [b, y]) =>
      y[0] / y[1] - x[0] / x[1] || alphabetical(strings[a], strings[b]));
  }

  function percent(k, n) {
    const value = 100 * k / n;
    return `${value.toFixed(value === 0 || value >= 9.95 ? 0 : 1)}%`;
  }

  function rates([k, n, cleanK, cleanN]) {
    const of = (yes, all) =>
      (all ? `${percent(yes, all)} (${thousands(yes)} of ${thousands(all)})` : '–');
    return `${of(k, n)} under the concept’s vector, ${of(cleanK, cleanN)} clean`;
  }

  function drawDots(active, found) {
    const wanted = active.find(({ name }) => name === 'prompt')?.value;
    const prompts = [...outcomes.keys()].filter((prompt) => (wanted ?? prompt) === prompt);
    let list = [];
    const prompt = prompts.find((one) => {
      list = tally(one, outcomes.get(one), active, found);
      return list.length > 0;
    });
    byId('dots').hidden = list.length === 0;
    if (list.length === 0) return;
    const outcome = outcomes.get(prompt);
    const sum = [0, 1, 2, 3].map((at) => list.reduce((all, [, one]) => all + one[at], 0));
    const title = `${strings[prompt]}, ${spaced(outcome.name)} by concept`;
    byId('rates').textContent = `${title}: ${rates(sum)}.`;
    const chosen = filters.find(({ name }) => name === 'concept');
    const choose = (name) => {
      chosen.select.value = chosen.select.value === name ? '' : name;
      update();
    };
    byId('picture').replaceChildren(picture(list, chosen.wanted(), choose));
  }

  function picture(list, chosen, choose) {
    const short = ([concept]) => strings[concept].replace(/^(.{17}).{2,}$/su, '$1…');
    const step = Math.min(20, Math.max(5, Math.floor(1030 / list.length)));
    const [left, top, bottom, labels] = [40, 8, 128, step >= 11];
    const below = labels ? 14 + 6 * Math.max(...list.map((one) => short(one).length)) : 8;
    const width = left + step * list.length + 8;
    const y = (k, n) => bottom - (bottom - top) * (k / n);
    const size = { width, height: bottom + below };
    const out = svg('svg', { ...size, role: 'img', 'aria-label': 'Concepts by share' });
    for (const half of [0, 1, 2]) {
      const at = y(half, 2);
      out.append(svg('line', { class: 'grid', x1: left, x2: width, y1: at, y2: at }),
        svg('text', { x: left - 6, y: at + 4 }, percent(half, 2)));
    }
    list.forEach(([concept, sum], place) => {
      const x = left + step * (place + 0.5);
      const at = y(sum[0], sum[1]);
      const dot = svg('g', { class: (chosen ?? concept) === concept ? '' : 'faint' },
        svg('title', {}, `${strings[concept]}: ${rates(sum)}`),
        svg('rect', { class: 'hit', x: x - step / 2, y: 0, width: step, height: '100%' }));
      if (sum[3] > 0) {
        const chance = y(sum[2], sum[3]);
        dot.append(svg('line', { x1: x, x2: x, y1: chance, y2: at }),
          svg('rect', { class: 'clean', x: x - 3, y: chance - 3, width: 6, height: 6 }));
      }
      dot.append(svg('circle', { cx: x, cy: at, r: Math.min(4.5, step / 2) }));
      const transform = `translate(${x + 4} ${bottom + 10}) rotate(-90)`;
      if (labels) dot.append(svg('text', { transform }, short([concept])));
      dot.addEventListener('click', () => choose(strings[concept]));
      out.append(dot);
    });
    return out;
  }

  // The state in the address.

  function save(active) {
    const state = new URLSearchParams(active.map(({ name, select }) => [name, select.value]));
    if (query) state.set('q', search.value.trim());
    if (String(state)) history.replaceState(null, '', HASH + state);
    else if (location.hash.startsWith(HASH)) history.replaceState(null, '', '#explore');
  }

  function load() {
    const state = new URLSearchParams(location.hash.slice(HASH.length));
    search.value = state.get('q') ?? '';
    for (const { name, select } of filters) {
      select.value = state.get(name) ?? '';
      if (select.selectedIndex < 0) select.selectedIndex = 0;
    }
    update();
    byId('app').scrollIntoView();
  }

  search.addEventListener('input', update);
  byId('more').addEventListener('click', () => {
    more().querySelector('button').focus({ preventScroll: true });
  });
  byId('reset').addEventListener('click', () => {
    search.value = '';
    for (const { select } of filters) select.selectedIndex = 0;
    update();
    search.focus();
  });
  addEventListener('hashchange', () => location.hash.startsWith(HASH) && load());
  byId('app').hidden = false;
  if (location.hash.startsWith(HASH)) load();
  else update();
  // Before the first key is pressed.
  setTimeout(() => { folded ??= strings.map(fold); });
})();
