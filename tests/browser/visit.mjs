// Opens pages in headless Chromium, as JSON on standard input names them, and prints the results as JSON.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.NODE_MODULES}/`);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core"), "utf8");
const order = JSON.parse(readFileSync(0, "utf8"));
const args = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--font-render-hinting=none",
];

async function open({ url, width, scheme, javascript, screenshot, until }) {
  const context = await chromium.launchPersistentContext(`${order.profile}-${width}-${scheme}-${javascript}`, {
    executablePath: order.chromium,
    args,
    viewport: { width, height: width < 600 ? 844 : 900 },
    colorScheme: scheme,
    javaScriptEnabled: javascript,
    serviceWorkers: "block",
  });
  const page = await context.newPage();
  const messages = [];
  page.on("console", (message) => messages.push(message.text()));
  page.on("pageerror", (error) => messages.push(String(error)));
  page.on("request", (request) => request.url() === url || messages.push(`loads ${request.url().slice(0, 80)}`));
  await page.goto(url);
  const facts = await page.evaluate(look);
  const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  const text = await page.innerText("body");
  if (screenshot) {
    const end = await page.evaluate((selector) => document.querySelector(selector).getBoundingClientRect().bottom, until);
    await page.screenshot({ path: screenshot, fullPage: true, clip: { x: 0, y: 0, width, height: Math.ceil(end) + 24 } });
  }
  let violations = [];
  if (javascript) {
    await page.evaluate(axe);
    const found = await page.evaluate(() => axe.run());
    violations = found.violations.map((each) => `${each.id}: ${each.nodes.map((node) => node.html).join(" ")}`.slice(0, 400));
  }
  await context.close();
  return { violations, messages, overflow, text, facts };
}

function look() {
  const box = document.querySelector(".matrix");
  if (box === null) return {};
  const inside = (element) => {
    const [outer, inner] = [box.getBoundingClientRect(), element.getBoundingClientRect()];
    return inner.left >= outer.left - 1 && inner.right <= outer.right + 1;
  };
  const row = box.querySelector("tbody tr:not(.drop)") ?? box.querySelector("tbody tr");
  const drawing = row.querySelector("svg").getBoundingClientRect();
  return {
    scrolls: box.scrollWidth > box.clientWidth,
    newestDayIsVisible: Math.abs(box.getBoundingClientRect().right - drawing.right) < 40,
    nameIsVisible: inside(row.querySelector("th")),
  };
}

const results = [];
for (const visit of order.visits) results.push(await open(visit));
process.stdout.write(JSON.stringify(results));
