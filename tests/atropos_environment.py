"""An environment as users of `atroposlib` write one: nothing of ours is imported. Run as `python FILE serve ...`."""

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup


class DigitsEnv(BaseEnv):
    """Wants digits: the reward is the part of the answer that is."""

    name = "digits"
    env_config_cls = BaseEnvConfig

    @classmethod
    def config_init(cls):
        config = BaseEnvConfig(
            group_size=2, max_token_length=32, wandb_name="digits", use_wandb=False, max_num_workers=2, steps_per_eval=0
        )
        return config, [APIServerConfig(num_requests_for_eval=4)]

    async def setup(self):
        self.next_item = 0

    async def get_next_item(self):
        self.next_item += 1
        return f"{self.next_item % 90 + 10}+1="

    async def collect_trajectories(self, item):
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            await managed.chat_completion(
                messages=[{"role": "user", "content": item}], n=self.config.group_size, max_tokens=16, temperature=1.0
            )
            nodes = managed.get_state()["nodes"]
        group = ScoredDataGroup(tokens=[], masks=[], scores=[], inference_logprobs=[])
        for node in nodes:
            answer = self.tokenizer.decode([token for token in node.masked_tokens if token != -100])
            group["tokens"].append(node.tokens)
            group["masks"].append(node.masked_tokens)
            group["inference_logprobs"].append(node.logprobs)
            group["scores"].append(sum(letter.isdigit() for letter in answer) / 16)
        return group, []

    async def evaluate(self, *args, **kwargs):
        answer = await self.server.chat_completion(
            messages=[{"role": "user", "content": "1+1="}], n=2, max_tokens=8, temperature=1.0, split="eval"
        )
        texts = [choice.message.content for choice in answer.choices]
        await self.evaluate_log(
            {"eval/digits": sum(map(str.isdigit, texts)) / len(texts)},
            task_name="digits",
            model_name="tiny",
            samples=[{"text": text} for text in texts],
        )


if __name__ == "__main__":
    DigitsEnv.cli()
