const CARDS = ".tile, figure, article, td, th, dd, dt, li, summary, h1, h2, h3, header, main, footer";
const inside = (box, outer) => box.left >= outer.left - 1 && box.right <= outer.right + 1;
const scrolls = (element) => element.closest(".scroll, pre");
const say = (element, text) => {
  const named = element.closest("[class]")?.className ?? "";
  return `${named.baseVal ?? named} <${element.tagName}>: ${JSON.stringify(text.trim().slice(0, 60))}`;
};
function faults(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, found = [];
  if (page.documentElement.scrollWidth > view.innerWidth) found.push(`page is ${page.documentElement.scrollWidth} wide`);
  const texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode, element = node.parentElement;
    if (!node.data.trim() || element.closest("script, style, title, .hidden, details:not([open]) > :not(summary)")) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    const card = element.closest(CARDS);
    for (const box of range.getClientRects()) {
      if (!box.width || scrolls(element)) continue;
      if (box.left < -1 || box.right > view.innerWidth + 1) found.push("out of sight: " + say(element, node.data));
      else if (card && !inside(box, card.getBoundingClientRect())) found.push("out of its card: " + say(element, node.data));
    }
    for (let one = element; one && one !== page.body; one = one.parentElement) {
      const style = view.getComputedStyle(one);
      if (style.overflowX === "hidden" && one.scrollWidth > one.clientWidth + 1) found.push("cut: " + say(one, node.data));
    }
  }
  for (const picture of page.querySelectorAll("svg")) {
    const labels = [...picture.querySelectorAll("text")].map((text) => [text, text.getBoundingClientRect()]);
    const figure = (picture.closest(".scroll") ? picture : picture.closest("figure")).getBoundingClientRect();
    labels.forEach(([text, box], i) => {
      if (!inside(box, figure)) found.push("out of its figure: " + say(text, text.textContent));
      for (const [other, there] of labels.slice(i + 1))
        if (box.left < there.right && there.left < box.right && box.top + 3 < there.bottom && there.top + 3 < box.bottom)
          found.push("covers " + other.textContent + ": " + say(text, text.textContent));
    });
  }
  return [...new Set(found)];
}
window.addEventListener("load", () => {
  const all = [];
  for (const frame of document.querySelectorAll("iframe"))
    all.push(...faults(frame).map((line) => `${frame.title} at ${frame.width}: ${line}`));
  const result = document.createElement("pre");
  result.id = "faults";
  result.textContent = JSON.stringify(all);
  document.body.replaceChildren(result);
});
