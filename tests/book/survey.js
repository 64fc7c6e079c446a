// Run in a page without animations by test_book.py: what a reader's eye would catch. Returns plain data.
async () => {
  const found = {};
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  found.width = document.documentElement.scrollWidth;
  found.formulas = document.querySelectorAll("mjx-container").length;
  found.unrendered = document.querySelectorAll("div.math, span.math").length - found.formulas;
  found.broken_formulas = [...document.querySelectorAll("mjx-merror")].map((e) => e.textContent);
  found.broken_images = [...document.images].filter((i) => i.complete && !i.naturalWidth).map((i) => i.src);
  found.without_alt = [...document.querySelectorAll(".bd-article img")].filter((i) => !i.alt).length;

  // A slider that is moved must change its figure.
  found.sliders = 0;
  found.dead_sliders = [];
  for (const explorer of document.querySelectorAll(".explore")) {
    for (const slider of explorer.querySelectorAll("input[type=range]")) {
      const before = explorer.querySelector("img").src;
      if (slider.value === slider.max) slider.stepDown();
      else slider.stepUp();
      slider.dispatchEvent(new Event("input", { bubbles: true }));
      if (explorer.querySelector("img").src === before) found.dead_sliders.push(String(found.sliders));
      found.sliders += 1;
    }
  }

  // Contrast of every visible piece of text with what is painted behind it, in dark mode.
  document.documentElement.dataset.theme = "dark";
  document.documentElement.dataset.mode = "dark";
  await new Promise((done) => setTimeout(done, 20));
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parsed = new Map();
  const rgba = (color) => {
    if (!parsed.has(color)) {
      pen.clearRect(0, 0, 1, 1);
      pen.fillStyle = color;
      pen.fillRect(0, 0, 1, 1);
      parsed.set(color, [...pen.getImageData(0, 0, 1, 1).data].map((v) => v / 255));
    }
    return parsed.get(color);
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      if (style.backgroundImage !== "none") return null;
      layers.push(rgba(style.backgroundColor));
      if (layers.at(-1)[3] === 1) break;
    }
    return layers.reduceRight((below, layer) => over(layer, below), [0, 0, 0]);
  };
  const light = (color) => {
    const [r, g, b] = color.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = new Map();
  const walker = document.createTreeWalker(document.querySelector(".bd-main"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("svg, script, style, mjx-assistive-mml, .headerlink")) continue;
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const style = getComputedStyle(element);
    const below = behind(element);
    if (!below) continue;
    const [a, b] = [light(over(rgba(style.color), below)), light(below)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const needed = size >= 24 || (size >= 18.6 && style.fontWeight >= 700) ? 3 : 4.5;
    if (ratio < needed) {
      const name = `${element.tagName.toLowerCase()}.${element.className} ${style.color} on ${below.map((v) => Math.round(v * 255))}`;
      if (!faint.has(name)) faint.set(name, `${ratio.toFixed(2)} ${name}: ${walker.currentNode.data.trim().slice(0, 40)}`);
    }
  }
  found.faint = [...faint.values()];
  return found;
}
